"""A server with OpenAI's completions and chat completions over one model; it needs the extra "serve".

`listen` takes the address and `serve` answers there, as ``jaxmoe serve`` does. `make_app` gives the ASGI application alone.
"""

from jaxmoe.serving.app import make_app
from jaxmoe.serving.metrics import ExpertLoads, Metrics
from jaxmoe.serving.run import listen, run_service, serve
from jaxmoe.serving.service import Limits, Service

__all__ = ["ExpertLoads", "Limits", "Metrics", "Service", "listen", "make_app", "run_service", "serve"]
