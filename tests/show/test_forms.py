"""What is shown of a hit, against plain recomputation; and files of results, read again."""

import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner

import gradindex
from gradindex.cli import COMMANDS, main_group
from gradindex.results import Result
from search.show import html, task_words, wording
from search.show.data_files import csv_table, json_lines, parquet, read_result
from search.show.output_forms import render_form
from search.show.terminal_text import render_terminal
from support.indexes import APPLES

# ---- cards


def test_the_strongest_window(result):
    hit = max(result, key=lambda one: len(one.tokens))
    for size in (1, 3, 7, len(hit.tokens), 500):
        sums = [sum(map(abs, hit.token_influence[at : at + size]))
                for at in range(max(1, len(hit.tokens) - size + 1))]
        first, last = wording.window(hit, size)
        assert last - first == min(size, len(hit.tokens))
        assert sum(map(abs, hit.token_influence[first:last])) == pytest.approx(max(sums))


def test_tints_have_the_sign_and_fifteen_shades(result):
    scale = wording.strongest(result.hits)
    assert scale == max(abs(value) for hit in result for value in hit.token_influence)
    assert [wording.shade(value, 1.0) for value in (-1, -0.5, -0.07, 0, 0.07, 0.0715, 0.5, 1)] == \
        [-7, -4, 0, 0, 0, 1, 4, 7]
    for hit in result:
        runs = list(html.runs(hit, scale))
        assert "".join(text for text, _, _ in runs) == "".join(hit.tokens)
        tinted = [(text, tint, value) for text, tint, value in runs if tint]
        expected = [
            (token, f"{'p' if value > 0 else 'n'}{abs(wording.shade(value, scale))}",
             wording.number(value))
            for token, value in zip(hit.tokens, hit.token_influence, strict=True)
            if wording.shade(value, scale)]
        assert tinted == expected


def test_shares_of_kinds(index_folder, model_folder, data_file, tmp_path):
    index = gradindex.build(model_folder, data_file, out=tmp_path / "all.index", seq_len=24,
                            bits=512, batch_tokens=96, modules="all")
    hit = index.search(**APPLES, k=1)[0]
    kinds = {module.name: module.kind for module in index.manifest.modules}
    sums = {"mlp": 0.0, "attention": 0.0, "head": 0.0}
    for name, value in hit.module_influence.items():
        sums[kinds[name]] += value
    assert hit.kind_influence == pytest.approx(sums)
    assert sum(hit.kind_influence.values()) == pytest.approx(hit.influence, rel=1e-5)
    total = sum(map(abs, sums.values()))
    assert wording.part_shares(hit) == pytest.approx(
        {kind: value / total for kind, value in sums.items()})


def test_layer_strip_and_map(result):
    hit = result[0]
    names = task_words.layer_names(result)
    drawn = str(html.layer_bars(hit, names))
    assert drawn.count("<rect") == len(result.layers)
    for name, value in zip(names, hit.layer_influence, strict=True):
        assert f"{name}: {wording.number(value)}" in drawn
    columns = list(html.columns(hit, names))
    assert [token for token, _, _ in columns] == hit.tokens
    assert [said.partition(";")[0] for _, _, said in columns] == \
        [wording.number(sum(row)) for row in hit.token_layer_influence]


def test_the_units_and_the_sign_are_said_everywhere(result):
    for shown in (render_terminal(result), result._repr_html_(), html.document(result),
                  result.to_json(), csv_table(result),
                  *json_lines(result.hits, result.units).splitlines(),
                  parquet(result).decode("utf-8", "ignore")):
        together = " ".join(shown.split())
        assert "positive means that one more copy of the sequence would make" in together


def test_all_of_a_hit_stands_under_its_rank(result):
    long = replace(result, hits=[replace(result[0], user_id=" ".join(["name"] * 40))])
    lines = render_terminal(long, 80).split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith("  1  "))
    block = lines[start + 1 : lines.index("", start)]
    assert len(block) > 3 and all(line.startswith("     ") for line in block)
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines[start:]).split()).count("name") == 40


# ---- files


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "parquet", "html"])
def test_export_is_what_search_writes(result, form, tmp_path):
    (tmp_path / "result.json").write_text(result.to_json())
    out = tmp_path / f"again.{form}"
    done = CliRunner().invoke(main_group, ["export", str(tmp_path / "result.json"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == render_form(result, form)


def test_a_result_is_read_as_it_was(result):
    again = Result.from_json(result.to_json())
    assert again == result and again.to_json() == result.to_json()


def test_exact_scores_of_all_that_was_rescored(index, result):
    everyone = index.rescore(**APPLES, ids=range(len(index)))
    first = {hit.id: hit.influence for hit in everyone
             if not any(other < hit.id for other in hit.duplicates)}
    assert result.exact_influence == pytest.approx(
        sorted(first.values(), reverse=True), rel=1e-4, abs=1e-4)
    sample = index.snapshot.contents.ids[index.snapshot.random_sample()].tolist()
    of = {hit.id: hit.influence for hit in everyone}
    assert result.sample_influence == pytest.approx([of[one] for one in sample],
                                                    rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("change, said", [
    (lambda c: c.pop("schema"), "no schema"),
    (lambda c: c.update(schema=1), "schema 1"),
    (lambda c: c.update(results=[]), "is a comparison"),
    (lambda c: c["hits"][0].update(influence="many"), "hits.0.influence"),
    (lambda c: c["hits"][0]["token_influence"].pop(), "don't fit"),
    (lambda c: c["query"]["labels"].pop(), "differ in number"),
    (lambda c: c.update(layers=[]), "no layers"),
    (lambda c: c.pop("controls"), "controls"),
    (lambda c: c["controls"].pop("damping"), "controls are missing"),
])
def test_a_file_that_is_no_result(result, change, said, tmp_path):
    content = json.loads(result.to_json())
    change(content)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    with pytest.raises(gradindex.InputError, match=said):
        read_result(path)


def test_several_results_in_a_file(index, result, tmp_path):
    other = index.search(prompt="The pear", completion=" number", k=2)
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"asked": "x", **result.to_dict()}) + "\n" + other.to_json() + "\n")
    with pytest.raises(gradindex.InputError, match="holds 2 results"):
        read_result(path)
    (tmp_path / "pretty.json").write_text(json.dumps(json.loads(result.to_json()), indent=2))
    assert read_result(tmp_path / "pretty.json") == result
    assert read_result(path, 1) == result and read_result(path, 2) == other
    with pytest.raises(gradindex.InputError, match="--query 3"):
        read_result(path, 3)


def test_parquet_holds_everything(result):
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(parquet(result)))
    rows = table.to_pylist()
    for rank, (row, hit) in enumerate(zip(rows, result, strict=True), 1):
        assert row.pop("rank") == rank
        for name, value in row.items():
            own = getattr(hit, name)
            assert value == own or json.loads(value) == json.loads(json.dumps(own)), name
    about = json.loads(table.schema.metadata[b"gradindex"])
    assert about == {name: value for name, value in
                     json.loads(result.to_json()).items() if name != "hits"}


def test_csv_has_the_users_fields(result):
    import csv
    import io

    rows = list(csv.DictReader(io.StringIO(csv_table(result))))
    assert [row["field:place"] for row in rows] == [hit.fields["place"] for hit in result]


def test_hits_that_rose_and_fell(result):
    hits = [replace(result[0], id=n, code_rank=rank) for n, rank in enumerate((5, 1, 9, 2))]
    assert wording.moved(replace(result, hits=hits)) == {0: 2, 1: -1, 2: 1, 3: -2}


def test_a_comparison(index):
    both = index.compare(APPLES["prompt"], [APPLES["completion"], " 5 falls."], k=4)
    alone = [index.search(APPLES["prompt"], one, k=4)
             for one in (APPLES["completion"], " 5 falls.")]
    for mine, other in zip(both.results, alone, strict=True):
        assert [hit.id for hit in mine] == [hit.id for hit in other]
    ids = sorted({hit.id for one in alone for hit in one})
    assert sorted(both.influence) == ids
    for place, completion in enumerate((APPLES["completion"], " 5 falls.")):
        exact = index.rescore(APPLES["prompt"], completion, ids=ids)
        assert [both.influence[one][place] for one in ids] == pytest.approx(
            [hit.influence for hit in exact], rel=1e-4, abs=1e-4)
    first = [(a - b) for _, a, b in both.pairs()]
    assert first == sorted((a - b for a, b in both.influence.values()), reverse=True)
    assert json.loads(both.to_json())["influence"] == {
        str(one): list(pair) for one, pair in both.influence.items()}
    with pytest.raises(gradindex.InputError, match="two to compare"):
        index.compare("a", ["b"])
    with pytest.raises(gradindex.InputError, match="exact scores"):
        index.compare(APPLES["prompt"], [" 3", " 4"], rescore=False)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_an_example(name):
    shown = CliRunner().invoke(main_group, [name, "--help"]).output
    assert "Example:" in shown and f"gradindex {name} " in shown.partition("Example:")[2]
