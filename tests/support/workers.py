"""How pytest-xdist shares out the tests: one at a time, but for files that make something long."""

from xdist.scheduler import LoadScopeScheduling

TOGETHER = {  # what each worker would make again
    "tests/journeys/test_commands.py": "a trained model and its index",
    "tests/rank/test_ray_search.py": "a cluster, and workers that have loaded the index",
    "tests/show/test_page.py": "a browser, and what it looks at",
    "tests/test_docs.py": "a shell, and the folder that the documents work in",
    "tests/test_examples.py": "what a demo leaves",
    "tests/parallel/test_ray_build.py": "a cluster",
}


class Scheduling(LoadScopeScheduling):
    """The files of TOGETHER first, each by one worker, then all other tests."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file in TOGETHER else nodeid
