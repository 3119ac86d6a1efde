"""A Ray cluster of two nodes on this machine, on which nobody is given up for being slow.

To be imported before Ray, which reads its settings once.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

from support.waiting import HANG, until

SECONDS, MILLISECONDS = str(int(HANG)), str(int(1000 * HANG))
os.environ.update({
    "RAY_gcs_server_port_wait_time_s": SECONDS,
    "RAY_gcs_server_request_timeout_seconds": SECONDS,
    "RAY_worker_register_timeout_seconds": SECONDS,
    "RAY_agent_register_timeout_ms": MILLISECONDS,
    "RAY_health_check_timeout_ms": MILLISECONDS,
    "RAY_worker_niceness": "0",  # not Ray's 15: beside busy processes that is next to nothing
    "RAY_memory_monitor_refresh_ms": "0",  # what else fills the memory isn't the tests' doing
})


@contextlib.contextmanager
def two_nodes(**node: Any) -> Iterator[Any]:
    """A cluster of two such nodes, the first of them its head."""
    from ray._private import services
    from ray.cluster_utils import Cluster

    get_node = services.get_node  # raises RuntimeError as long as the node isn't there

    def found(*given: Any) -> Any:
        with contextlib.suppress(RuntimeError):
            return get_node(*given)

    node = {**node, "wait": False, "object_store_memory": 80 << 20}
    with mock.patch.object(services, "get_node", lambda *given: until(lambda: found(*given))):
        cluster = Cluster(initialize_head=True,
                          head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
    cluster.wait_for_nodes(HANG)
    yield cluster
    cluster.shutdown()
