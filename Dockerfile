FROM python:3.11-slim AS build
WORKDIR /src
COPY requirements.txt pyproject.toml README.md ./
RUN python -m venv /app && /app/bin/pip install --no-cache-dir --require-hashes -r requirements.txt
COPY proto proto
COPY services services
COPY gateway gateway
COPY migrations migrations
RUN /app/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim
COPY --from=build /app /app
# Local bots keep their files in /data, a key ring may be in /keys; a volume takes over the owner.
RUN useradd --create-home --uid 10001 clawplane && install -d -o clawplane /data && install -d -o clawplane -m 0700 /keys
USER clawplane
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/clawplane
CMD ["clawplane", "--help"]
