"""Serve OpenAI's API with two replicas of a model behind Ray Serve, on all machines of a cluster.

python examples/ray_serve.py [MODEL_DIR]
"""

import sys

from ray import serve

from minigpt4_runtime import MiniGPT4
from minigpt4_runtime.server.app import create_app
from minigpt4_runtime.server.settings import ServerConfig

# Requests with one x-session-id reach the same replica, which has their prefix cached.
STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Server:
    """A model with the server's own routes, limits and watch over the engine."""

    def __init__(self, model_dir: str | None = None) -> None:
        self.server = create_app(MiniGPT4.load(model_dir), ServerConfig(model_name="minigpt4"))

    def __serve_build_asgi_app__(self) -> object:
        return self.server

    def check_health(self) -> None:
        """Let Serve replace a replica whose engine has failed."""
        if self.server.state.parts.watch.has_failed:
            raise RuntimeError(self.server.state.parts.watch.trouble)


Replica = serve.deployment(
    num_replicas=2, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=256,
    health_check_period_s=5, graceful_shutdown_timeout_s=60,
    request_router_config={"request_router_class": STICKY},
)(serve.ingress()(Server))  # fmt: skip

if __name__ == "__main__":
    serve.run(Replica.bind(*sys.argv[1:]), blocking=True)
