"""`gradindex export`: flags → a result in another form."""

from pathlib import Path

import click

from search.query_flags import OUTPUT_FILE, check_outputs, write_output


@click.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=OUTPUT_FILE,
              help="File to write: .html, .json, .jsonl, .csv or .parquet.")
@click.option("--query", "number", type=int, metavar="N",
              help="Which of several results, from 1 on.")
def export(result: Path, output: Path, number: int | None) -> int:
    """Write a saved result in another form.

    RESULT is what `search --format json -o FILE` wrote, a download of the page, or the file of
    results of `search --queries`. HTML is one file that needs nothing else and shows everything.

    \b
    Example:
      gradindex search train.index -p "2 +" -c " 2" -o result.json
      gradindex export result.json -o result.html
    """
    from search.show.data_files import read_result
    from search.show.output_forms import FORM_OF_SUFFIX, form_of, render_form

    check_outputs({"-o": output}, [result])
    form = form_of(output)
    if form is None:
        endings = ", ".join(FORM_OF_SUFFIX)
        raise click.UsageError(f"-o {output}: expected a name that ends in {endings}.")
    write_output(output, render_form(read_result(result, number), form))
    return 0
