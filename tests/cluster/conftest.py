"""What tests with Ray share: a cluster, and an S3 server, both on this machine."""

import secrets

import pytest


@pytest.fixture(scope="session")
def s3():
    """fsspec's view of an S3 server without an object. Processes started later find it as well."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        store = s3fs.S3FileSystem()
        store.mkdir("bucket")
        yield store
    server.stop()


@pytest.fixture(scope="session")
def ray(s3):
    """A cluster of two CPUs on this machine, whose workers can reach the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        # Without these, which it reads when it is imported, Ray would keep a token at home.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        yield ray
        ray.shutdown()
