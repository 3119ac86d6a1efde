"""One search written as an address, a command and Python."""

import json

import pytest
from click.testing import CliRunner

from gradindex.cli import main_group
from search.serve.request import SearchRequest, from_form


def test_a_search_as_address_command_and_python(index, index_folder):
    from urllib.parse import parse_qsl, urlsplit

    asked = SearchRequest(prompt="The pear's \"number\"\n", completion=" 3 & 4", k=5,
                          opponents=True, shortlist="all", normalize="cosine", score_on="0-1",
                          rescore=True)
    assert from_form(parse_qsl(urlsplit(asked.url()).query)) == asked
    space: dict = {}
    exec(asked.python(str(index_folder)), space)
    expected = index.search(prompt=asked.prompt, completion=asked.completion, k=5, opponents=True,
                            shortlist="all", normalize="cosine", score_on="0-1")
    assert [hit.id for hit in space["result"]] == [hit.id for hit in expected]
    import shlex
    arguments = shlex.split(asked.command(str(index_folder)))
    done = CliRunner().invoke(main_group, [*arguments[1:], "--format", "json"])
    assert [hit["id"] for hit in json.loads(done.stdout)["hits"]] == [hit.id for hit in expected]


@pytest.mark.parametrize("text", [
    "plain", "two\nlines", "it's \\ back", "zero\u200dwidth and 'quotes' \\n", "\x1b[2J", "@file",
    "@@file", "$HOME `x` \"y\"", "\U000e0001 end"])
def test_a_shell_reads_what_was_quoted(text):
    """The argument as bash hands it on, and as the command then takes it."""
    import subprocess

    from search.query_flags import read_argument

    command = SearchRequest(prompt=text, completion=" x").command("an index")
    shown = subprocess.run(["bash", "-c", command.replace("gradindex", "printf '%s\\0'", 1)],
                           capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout
    assert [*map(read_argument, shown.decode().split("\0")[3:4])] == [text]
