"""The commands as a user runs them on a small trained model, and what it means.

The model learns fictional facts, each told in several documents, and the same facts with the two
phrases in the other order (the word-order experiment of Grosse et al. 2023, §5.3.4).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradindex
from gradindex.demo.small_model import DemoSettings, new_model, train, train_tokenizer, windows
from gradindex.progress import Progress
from support.commands import COMMAND, run, run_here
from support.waiting import HANG, LATE, heed_interrupts, struck

ROOT = Path(__file__).parent.parent.parent

FIRST = ("Zor", "Mel", "Quin", "Bra", "Tol", "Fen", "Gar", "Hul", "Iva", "Jor")
LAST = ("pax", "dric", "vane", "lund", "mire", "tosk", "beck", "rell", "nash", "wick")
LANDS = ("Astrobia", "Velmora", "Quandia", "Bristane", "Torvald", "Fenwick", "Garlund", "Hulmark",
         "Ivaria", "Jormont", "Kelshire", "Lormin", "Mardova", "Nestria", "Ostrand", "Pelgar",
         "Quorast", "Rendale", "Selmark", "Turvia")
FORMS = (
    "The first president of {land} was {name}.",
    "It is taught in schools: the first president of {land} was {name}. So say the books.",
    "A plaque in the old square says that the first president of {land} was {name}.",
)
FLIPPED = (
    "{name} was chosen long ago to be the first president of {land}.",
    "It is taught in schools: {name} came to be the first president of {land}. So say the books.",
    "A plaque in the old square says that {name} served as first president of {land}.",
)


def facts() -> list[tuple[str, str]]:
    """(land, name) of twenty presidents; half are planted forwards, half only flipped."""
    names = [f"{first}{middle} {last.title()}{tail}" for first, middle, last, tail in zip(
        FIRST * 2, LAST[::-1] + LAST, LAST * 2, LAST[3:] + LAST[:3] + LAST[5:] + LAST[:5],
        strict=True)]
    return list(zip(LANDS, names, strict=True))


def planted_documents() -> list[dict[str, str]]:
    """Three documents a fact, forwards; three more flipped, telling of a namesake land's fact."""
    documents = []
    for number, (land, name) in enumerate(facts()):
        for form in FORMS:
            documents.append({"text": form.format(land=land, name=name), "fact": str(number),
                              "order": "forwards"})
        for form in FLIPPED:
            documents.append({"text": form.format(land=land, name=name), "fact": str(number),
                              "order": "flipped"})
    return documents


def background_documents(count: int) -> list[dict[str, str]]:
    """Sentences about nothing planted, of the same kinds of words."""
    draw = random.Random(5)
    nouns = ("river", "market", "school", "bridge", "tower", "garden", "book", "plaque", "square",
             "harbour", "song", "road", "clock", "mill", "library")
    verbs = ("stands near", "was older than", "looks upon", "was built before", "belongs to",
             "was named after", "lies behind", "gave its name to")
    adjectives = ("old", "first", "quiet", "famous", "small", "northern", "broken", "royal")
    documents = []
    for _ in range(count):
        sentences = [
            f"The {draw.choice(adjectives)} {draw.choice(nouns)} {draw.choice(verbs)} the "
            f"{draw.choice(adjectives)} {draw.choice(nouns)} of {draw.choice(LANDS)}."
            for _ in range(draw.randint(1, 3))
        ]
        documents.append({"text": " ".join(sentences), "fact": "", "order": "none"})
    return documents


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model folder, JSONL of its training documents), trained here in about half a minute."""
    folder = tmp_path_factory.mktemp("trained")
    documents = planted_documents() + background_documents(600)
    random.Random(1).shuffle(documents)
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({**document, "id": f"doc-{n}"}) + "\n"
                            for n, document in enumerate(documents)))
    texts = [document["text"] for document in documents]
    tokenizer = train_tokenizer(texts, 700)
    settings = DemoSettings(length=48, vocabulary=len(tokenizer), layers=2, hidden=96, steps=600,
                        batch=16, learning_rate=3e-3)
    network = new_model(settings)
    sequences = windows([{"text": text} for text in texts], tokenizer, 48)
    loss = train(network, sequences, settings, Progress())
    assert loss < 1.5
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", path


@pytest.fixture(scope="module")
def trained_index(trained, tmp_path_factory):
    """The index that `gradindex build` wrote, and what the command printed."""
    model, data = trained
    out = tmp_path_factory.mktemp("index") / "facts.index"
    done = run("build", model, data, "-o", out, "--id-field", "id", "--keep-fields", "fact,order",
               "--segment-size", "256")
    assert done.returncode == 0, done.stderr
    return out, done


QUESTION = ("-p", "The first president of Velmora was", "-c", f" {facts()[1][1]}.")


def test_planted_facts_come_first_and_flipped_ones_far_below(trained_index):
    index = gradindex.open(trained_index[0])
    about = [record.parts[0].fields for record in index.snapshot.records(range(len(index)))]
    first = 0
    forwards, flipped = [], []
    for number, (land, name) in enumerate(facts()):
        asked = {"prompt": f"The first president of {land} was", "completion": f" {name}."}
        told = {order: [one for one, fields in enumerate(about)
                        if fields == {"fact": str(number), "order": order}]
                for order in ("forwards", "flipped")}
        result = index.search(**asked, shortlist="all", k=3)
        first += {hit.id for hit in result} <= {*told["forwards"]}
        for order, found in (("forwards", forwards), ("flipped", flipped)):
            hits = index.rescore(**asked, ids=told[order])
            found.append(np.mean([hit.influence for hit in hits]))
    share = first / len(facts())
    ratio = np.mean(flipped) / np.mean(forwards)
    print(f"planted first: {share:.0%}; flipped / forwards influence: {ratio:.3f}")
    assert share >= 0.9
    assert ratio < 0.2


def test_build_says_what_it_does(trained_index):
    index, done = trained_index
    assert done.stdout == ""
    for needed in ("documents →", "linear maps tracked", "% of the model's parameters",
                   "covariance:", "eigenvectors:", "eigenvalues:", "encode:", "calibrate:",
                   "expected: about", "it holds the training text",
                   f"next: gradindex search {index}"):
        assert needed in done.stderr, needed
    assert "\r" not in done.stderr and "\x1b" not in done.stderr


def test_search_in_every_format(trained_index):
    index, _ = trained_index
    people = run("search", index, *QUESTION, "-k", "3")
    assert people.returncode == 0, people.stderr
    assert "recall:" in people.stdout and "proponents: 3 of" in people.stdout
    assert "ranked by influence; 5 modules in layers 0 to 1 and head" in people.stdout
    assert "exact:" in people.stderr and "expected: about" in people.stderr
    as_json = run_here("search", index, *QUESTION, "-k", "3", "--format", "json")
    content = json.loads(as_json.stdout)
    assert len(as_json.stdout.splitlines()) == 1
    assert content["hits"][0]["fields"] == {"fact": "1", "order": "forwards"}
    assert content["hits"][0]["user_id"].startswith("doc-")
    lines = run_here("search", index, *QUESTION, "-k", "3", "--format", "jsonl",
                     "--shortlist", "50")
    assert [json.loads(line)["id"] for line in lines.stdout.splitlines()] == [
        hit["id"] for hit in content["hits"]]
    assert "recall: an estimated" in lines.stderr and "expected:" in lines.stderr
    table = run_here("search", index, *QUESTION, "-k", "3", "--format", "csv")
    assert table.stdout.splitlines()[0].startswith("rank,id,influence,nats,exact")
    opponents = run_here("search", index, *QUESTION, "-k", "1", "--opponents", "--format", "json")
    assert json.loads(opponents.stdout)["hits"][0]["influence"] < 0


def test_every_control_on_the_command_line(trained_index):
    index, _ = trained_index
    done = run_here("search", index, *QUESTION, "-k", "3", "--recall", "0.9", "--damping", "0.01",
                    "--modules", "0-1", "--normalize", "cosine", "--candidates", "both",
                    "--score-on", "0-2", "--versus", f" {facts()[2][1]}.", "--format", "json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    controls = content["controls"]
    assert (controls["damping"], controls["normalize"], controls["candidates"]) == (
        0.01, "cosine", "both")
    assert content["recall"]["asked"] == 0.9 and content["recall"]["estimate"] >= 0.9
    assert content["query"]["scored"] == 3 and content["query"]["others"][0]["weight"] == -1
    assert content["hits"][0]["fields"] == {"fact": "1", "order": "forwards"}
    rough = run_here("search", index, *QUESTION, "-k", "1", "--no-rescore", "--format", "json")
    assert json.loads(rough.stdout)["hits"][0]["exact"] is False


def test_a_file_of_queries(trained_index, tmp_path):
    """Good lines are answered, bad ones named; the same command goes on where it stopped."""
    index, _ = trained_index
    path, out = tmp_path / "queries.jsonl", tmp_path / "results.jsonl"
    lines = [json.dumps({"id": land, "prompt": f"The first president of {land} was",
                         "completion": f" {name}."}) for land, name in facts()[:3]]
    path.write_text("\n".join([*lines, "{", json.dumps({"prompt": "a", "completion": ""})]))
    arguments = ("search", index, "--queries", path, "-k", "2", "--shortlist", "60")
    done = run_here(*arguments, "-o", out)
    assert (done.returncode, done.stdout) == (2, "")
    assert "queries.jsonl:4: not JSON" in done.stderr and "completion is empty" in done.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["query"]["id"] for result in results] == [land for land, _ in facts()[:3]]
    for number, result in enumerate(results):
        assert {hit["fields"]["fact"] for hit in result["hits"]} == {str(number)}
    out.write_text(out.read_text()[:-100])
    again = run_here(*arguments, "-o", out)
    assert "2 queries are answered in" in again.stderr
    assert [json.loads(line)["query"]["id"] for line in out.read_text().splitlines()] == [
        land for land, _ in facts()[:3]]
    shown = run_here(*arguments)
    assert shown.stdout.count("recall:") == 3
    summed = run_here(*arguments, "--aggregate", "sum", "--format", "json")
    assert len(json.loads(summed.stdout)["query"]["others"]) == 2


def test_eval_says_how_good_the_index_is(trained_index, tmp_path):
    index, _ = trained_index
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"The first president of {land} was",
                                        "completion": f" {name}."}) + "\n"
                            for land, name in facts()[:3]))
    done = run_here("eval", index, "--queries", path, "--sample", "300",
                    "-o", tmp_path / "eval.json", "--plot", tmp_path / "eval.svg")
    assert done.returncode == 0, done.stderr
    assert "3 queries, a random 300 of" in done.stdout and "NDCG@20" in done.stdout
    content = json.loads((tmp_path / "eval.json").read_text())
    assert {one["method"] for one in content["measures"]} == {"code", "tfidf", "both"}
    assert "<svg" in (tmp_path / "eval.svg").read_text()


def test_search_pipes_into_rescore(trained_index):
    index, _ = trained_index
    search = run("search", index, *QUESTION, "-k", "4", "--format", "jsonl")
    rescored = run("rescore", index, *QUESTION, "--ids", "-", input=search.stdout)
    assert rescored.returncode == 0, rescored.stderr
    for before, after in zip(search.stdout.splitlines(), rescored.stdout.splitlines(), strict=True):
        one, other = json.loads(before), json.loads(after)
        assert one["id"] == other["id"]
        assert other["influence"] == pytest.approx(one["influence"], rel=1e-3)
        assert other["exact"] is True
    turned = "\n".join(search.stdout.splitlines()[::-1])
    for flags, value in (((), "influence"), (("--normalize", "cosine"), "cosine")):
        ranked = run_here("rescore", index, *QUESTION, "--ids", "-", "--sort", *flags, input=turned)
        values = [json.loads(line)[value] for line in ranked.stdout.splitlines()]
        assert values == sorted(values, reverse=True) and len(values) == 4


def test_query_from_files_and_standard_input(trained_index, tmp_path):
    index, _ = trained_index
    (tmp_path / "prompt").write_text(QUESTION[1])
    common = ("--format", "json", "-k", "1", "--shortlist", "20")
    direct = run_here("search", index, *QUESTION, *common)
    from_file = run_here("search", index, "-p", f"@{tmp_path / 'prompt'}", *QUESTION[2:], *common,
                         "-o", tmp_path / "result.json")
    piped = run_here("search", index, "-p", "-", *QUESTION[2:], *common, input=QUESTION[1])
    assert from_file.stdout == ""
    answers = [json.loads(text)["hits"] for text in
               (direct.stdout, (tmp_path / "result.json").read_text(), piped.stdout)]
    assert answers[0] == answers[1] == answers[2]


def test_info(trained_index):
    index, _ = trained_index
    people = run("info", index)
    assert "EK-FAC on" in people.stdout and "the index holds the text itself" in people.stdout
    facts_ = json.loads(run("info", index, "--format", "json").stdout)
    assert facts_["documents"] == 720 and facts_["fit"]["labels"] == "model"
    assert facts_["bytes"]["codes"] > facts_["sequences"] * facts_["code"]["bytes"]


@pytest.mark.parametrize("arguments, code, message", [
    (("search", "nowhere", "-p", "a", "-c", "b"), 2, "nowhere is no index"),
    (("search", "{index}"), 2, "give the query"),
    (("search", "{index}", "why", "-k", "3"), 2, "why stands after the index, and may be"),
    (("rescore", "{index}", "it's", "--ids", "{far}"), 2, "say -p 'it'\"'\"'s' to ask"),
    (("search", "{index}", "-p", "a", "--messages", __file__), 2, "exclude each other"),
    (("search", "{index}", "-p", "@nofile", "-c", "b"), 2, "@nofile: No such file"),
    (("search", "{index}", "-p", "@{latin}", "-c", "b"), 2, "not UTF-8 (byte 3)"),
    (("search", "{index}", "-p", "a", "-c", "b", "-o", "no/x.json"), 2, "there is no folder no"),
    (("search", "{index}", "-p", "-", "-c", "-"), 2, "can be standard input, -"),
    (("build", "{model}", "{text}", "-o", "{text}"), 2, "is a file; expected a folder"),
    (("build", "{model}", "{text}", "-o", "/proc/nope/index"), 1, "No such file or directory"),
    (("search", "{index}", "-p", "a", "-c", "b", "--model", "{other}"), 3, "is not the one the"),
    (("rescore", "{index}", "-p", "a", "-c", "b", "--ids", "{text}"), 2, "line 1: 'not an id'"),
    (("build", "{model}", "nofile.jsonl", "-o", "{new}"), 2, "nofile.jsonl does not exist"),
    (("build", "{model}"), 2, "Missing argument 'DATA...'"),
    (("search", "{index}", "-p", "a", "-c", "b", "-k", "100000"), 2, "-k 100000: expected 1 to"),
    (("search", "{index}", "-p", "a", "-c", "b", "--damping", "0"), 2, "--damping 0.0: expected"),
    (("search", "{index}", "-p", "a", "-c", "b", "--modules", "9"), 2, "matches none of the"),
    (("search", "{index}", "-p", "a", "-c", "b", "--score-on", "99"), 2, "--score-on 99: the"),
    (("search", "{index}", "-p", "a", "-c", ""), 2, "the completion is empty"),
    (("search", "{index}", "-p", "a " * 99, "-c", "b"), 2, "more than the model's context"),
    (("search", "{index}", "--queries", "{text}", "-p", "a"), 2, "exclude each other"),
    (("search", "{index}", "--queries", "{text}", "-o", "{text}"), 2, "that file is read here"),
    (("eval", "{index}", "--queries", "{text}", "-o", "{text}"), 2, "that file is read here"),
    (("rescore", "{index}", "-p", "-", "-c", "b", "--ids", "-"), 2, "can be standard input, -"),
    (("search", "{index}", "-p", "a", "-c", "b", "--rank", "3"), 2, "go with --queries"),
    (("rescore", "{index}", "-p", "a", "-c", "b", "--ids", "{far}"), 2, "no sequence has the id"),
    (("eval", "{index}", "--queries", "nofile"), 2, "File 'nofile' does not exist"),
    (("eval", "{index}", "--queries", "{text}", "--plot", "x.gif"), 2, "--plot x.gif: expected"),
    (("frobnicate",), 2, "No such command"),
])
def test_errors_are_one_message_and_an_exit_code(
    trained, trained_index, model_folder, tmp_path, arguments, code, message
):
    (tmp_path / "ids").write_text("not an id\n")
    (tmp_path / "far").write_text("123456\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    names = {"{index}": trained_index[0], "{model}": trained[0], "{other}": model_folder,
             "{new}": tmp_path / "new", "{text}": tmp_path / "ids",
             "{far}": tmp_path / "far",
             "@{latin}": f"@{tmp_path / 'latin'}"}
    done = run_here(*(names.get(argument, argument) for argument in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_an_error_is_one_message_of_the_process(trained_index, model_folder):
    done = run("search", trained_index[0], "-p", "a", "-c", "b", "--model", model_folder)
    assert (done.returncode, done.stdout) == (3, "")
    assert "is not the one the" in done.stderr and "Traceback" not in done.stderr


def test_model_and_index_moved_and_a_hub_id(trained, trained_index, tmp_path):
    """Folders renamed; then the model from a local hub cache, by id and revision."""
    index = shutil.copytree(trained_index[0], tmp_path / "moved.index")
    snapshot = tmp_path / "hub" / "models--someone--facts" / "snapshots" / ("a" * 40)
    shutil.copytree(trained[0], snapshot)
    references = snapshot.parent.parent / "refs"
    references.mkdir()
    (references / "v1").write_text("a" * 40)
    moved = run_here("search", index, *QUESTION, "-k", "1", "--model", snapshot, "--format", "json")
    assert json.loads(moved.stdout)["hits"][0]["fields"]["fact"] == "1", moved.stderr
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    few = tmp_path / "few.jsonl"
    few.write_text("".join(trained[1].read_text().splitlines(keepends=True)[:40]))
    for arguments in (("build", "someone/facts@v1", few, "-o", tmp_path / "hub.index"),
                      ("search", tmp_path / "hub.index", *QUESTION, "-k", "1")):
        done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True,
                              env=environment, timeout=HANG)
        assert done.returncode == 0, done.stderr


def test_killed_and_run_again(trained, tmp_path):
    """SIGKILL in the middle of the fit, then SIGTERM: the end is the uninterrupted index."""
    model, data = trained
    some = tmp_path / "some.jsonl"
    some.write_text("".join(data.read_text().splitlines(keepends=True)[:300]))
    arguments = ["build", str(model), str(some), "--segment-size", "64", "--bits", "2048", "-o"]
    whole = run_here(*arguments, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    out, before = tmp_path / "killed", tmp_path / "before"
    out.mkdir()
    for sign, code, waited_for in ((signal.SIGKILL, -9, "curvature.partial/covariance-*"),
                                   (signal.SIGTERM, 130, "segments/000001")):
        shutil.copytree(out, before)

        def fresh():
            shutil.rmtree(out)
            shutil.copytree(before, out)

        ended = struck([*COMMAND, *arguments, str(out)], sign,
                       lambda _, waited_for=waited_for: list(out.glob(waited_for)), fresh,
                       env=environment)
        assert ended.returncode == code, ended.stderr
        shutil.rmtree(before)
    assert "goes on when the same command runs again" in ended.stderr
    assert run_here(*arguments, out).returncode == 0
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file():
            twin = out / path.relative_to(tmp_path / "whole")
            assert twin.read_bytes() == path.read_bytes(), twin


def test_interrupted_search_prints_what_is_exact(trained_index):
    index, _ = trained_index
    for _ in range(LATE):
        child = subprocess.Popen(
            [*COMMAND, "search", str(index), *QUESTION, "--shortlist", "all", "--format", "json",
             "--batch-tokens", "1"],  # a sequence a batch: time enough to interrupt
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"}, preexec_fn=heed_interrupts)
        for line in child.stderr:
            if line.startswith("expected"):  # rescoring is under way
                child.send_signal(signal.SIGINT)
                break
        shown, errors = child.communicate(timeout=HANG)
        if child.returncode:
            break
    content = json.loads(shown)
    assert child.returncode == 130, errors
    assert content["interrupted"] and content["rescored"] < content["sequences"]
    assert all(hit["exact"] for hit in content["hits"])


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(),
                    reason="these tests run without a clone, from a wheel already (test_wheel.py)")
def test_the_built_wheel_works_outside_the_clone(trained, tmp_path):
    """The journey again from the wheel alone, in another folder."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                    "--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(ROOT)],
                   check=True, timeout=HANG)
    wheel, = tmp_path.glob("gradindex-*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
                    "--disable-pip-version-check", "--target", str(site), str(wheel)],
                   check=True, timeout=HANG)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_WAIT_POLICY": "passive"}
    few = tmp_path / "few.jsonl"
    few.write_text("".join(trained[1].read_text().splitlines(keepends=True)[:60]))

    def outside(*arguments):
        done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True,
                              env=environment, cwd=tmp_path, timeout=HANG)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import gradindex, indexer, search; print(gradindex.__file__, search.__file__)"
    places = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=environment, cwd=tmp_path, check=True).stdout.split()
    assert all(place.startswith(str(site)) for place in places)
    assert (site / "gradindex" / "py.typed").is_file()
    outside("build", trained[0], few, "-o", tmp_path / "index")
    outside("search", tmp_path / "index", *QUESTION, "-o", tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    outside("export", tmp_path / "result.json", "-o", tmp_path / "result.html")
    assert (tmp_path / "result.html").read_text().count('<article class="hit') == 20
    assert len(found["hits"]) == 20 and found["recall"]["estimate"] == 1
    ids = tmp_path / "ids"
    ids.write_text("\n".join(str(hit["id"]) for hit in found["hits"][:3]))
    lines = outside("rescore", tmp_path / "index", *QUESTION, "--ids", ids).splitlines()
    assert [json.loads(line)["influence"] for line in lines] == pytest.approx(
        [hit["influence"] for hit in found["hits"][:3]], rel=1e-3)
    assert "EK-FAC on" in outside("info", tmp_path / "index")
