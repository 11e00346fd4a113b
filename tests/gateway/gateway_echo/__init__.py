"""A service for the tests of transcoding, with the forms of request that the contracts do not need yet."""
