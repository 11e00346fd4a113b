"""docs/seeds.md against the models: what it names exists, and no column of the seeds is forgotten."""

import re
from pathlib import Path

from gateway import httprule
from tests.test_migrations import metadata_of

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "seeds.md").read_text()

SEEDS = {
    "users": "id clerk_user_id email polar_customer_id tier subscription_status created_at updated_at username full_name avatar_url "
    "password_hash bio location website_url github_username email_verified is_active is_premium preferences settings last_login_at "
    "email_verified_at name provider picture metadata",
    "deployments": "id user_id email model channel channel_token channel_api_key claw_api_key akash_deployment_id akash_lease_id "
    "provider_url status payment_provider stripe_session_id stripe_payment_intent_id polar_id error_message created_at updated_at",
    "llm_usage_log": "id user_id deployment_id tokens_used provider timestamp",
    "provider_blacklist": "provider_address reason created_at expires_at",
}


def test_what_the_page_names_exists() -> None:
    named = re.findall(r"`(user_svc|deployment_svc)\.(\w+)\.(\w+)`", TEXT)
    assert len(named) > 50
    for service, table, column in named:
        tables = metadata_of(service).tables
        assert table in tables, table
        assert column in tables[table].columns, f"{table}.{column}"


def test_no_column_of_the_seeds_is_forgotten() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")]
    for entity, columns in SEEDS.items():
        said = " ".join(what for _, of, what, _ in rows if of == entity)
        for column in columns.split():
            assert re.search(rf"\b{column}\b", said), f"{entity}.{column}"


def test_the_methods_that_it_names_exist() -> None:
    named = set(re.findall(r"`((?:user|deployment)\.v1)\.(\w+)/(\w+)`", TEXT))
    assert len(named) > 15
    services = {service.full_name: service for service in httprule.services()}
    for package, service, method in named:
        assert method in services[f"clawplane.{package}.{service}"].methods_by_name, (service, method)
