"""What is said of a query and a hit by task: their texts, labels and log p."""

from dataclasses import dataclass, replace

from gradindex.modules import EMBEDDED
from gradindex.results import Hit, Query, Result

HEAD = "head"  # a kind of modules
PAIR, SECOND_TEXT = ("chosen", "rejected"), ("text", "second text")
# by task, what the page asks for, and what its rows are
_OF_PAIRS = ("Type a prompt with the answer that is preferred and the one that isn't, or with one "
             "response, whose reward is then explained.")
INVITATION = {
    "causal": "Type what the model read and what it went on to say.",
    "classification": "Type what the model read, and choose a label or take the model's own.",
    "reward": _OF_PAIRS, "preference": _OF_PAIRS,
}
ROWS = {"causal": "sequences", "classification": "texts", "reward": "pairs", "preference": "pairs"}


def logarithm(query: Query, task: str) -> str:
    """The name of what was differentiated: log p, or a difference or sum of several."""
    weights = tuple(text.weight for text in query.others)
    if query.unit != "nats":
        # a policy's reward less what its reference says, which is a constant beside a query
        reward = "β log π" if task == "preference" else "reward"
        return {(): reward, (-1.0,): f"{reward}(chosen) − {reward}(rejected)"}.get(
            weights, f"weighted sum of {reward}" + "s" * (reward == "reward"))
    of_pair = query.border is not None and query.label_name is None
    one = "log p" if query.label_name is None and not of_pair else \
        f"log p({query.label_name or 'chosen over rejected'})"
    versus = "versus" if not query.others or query.others[0].label_name is None else \
        query.others[0].label_name
    return {(): one, (-1.0,): f"{one} − log p({versus})"}.get(weights, "weighted sum of log p")


def asked_of(query: Query, task: str) -> str:
    """What was asked about, and what the model says of it."""
    value = f"{logarithm(query, task)} = {_short(query.log_p)}"
    if task == "causal":
        scored = sum(text.scored for text in query.texts)
        return f"{scored} token{'s' * (scored != 1)} scored, {value} nats"
    margin = f", margin {query.offset:g}" if query.offset else ""
    return value + (" nats" if query.unit == "nats" else "") + margin


def title(query: Query) -> str:
    """A query in a few words."""
    if query.label_name is not None:
        return f"{query.prompt or ''} → {query.label_name}"
    return query.completion or "a query"


@dataclass(frozen=True)
class Asked:
    """A text of a query: its name, its first and last + 1 token, and the label asked about with it.

    `marked` is whether its scored tokens are marked: where what is asked about isn't all of it.
    """

    name: str
    text: Query
    first: int
    last: int
    marked: bool = False
    label: str | None = None


def texts_of_query(result: Result) -> list[Asked]:
    """The texts of a query, in the order in which they are shown."""
    query = result.query
    found: list[Asked] = []
    for text in query.texts:
        end = len(text.token_texts)
        if result.task == "causal":
            name = "query" if text is query else "versus" if text.weight < 0 else "plus"
            found.append(Asked(name, text, 0, end, marked=True))
        elif text.label_name is not None and text.weight < 0 and found:
            # another label of the same text is said behind the first one
            found[-1] = replace(
                found[-1], label=f"{found[-1].label}, rather than {text.label_name}")
        elif text.label_name is not None:
            found += [Asked(name, text, first, last)
                      for name, first, last in _parts(text.border, end, SECOND_TEXT)]
            own = ", the model's own" * text.generated
            found[-1] = replace(found[-1], label=f"{text.label_name}{own}")
        elif text.border is not None:
            found += [Asked(name, text, first, last)
                      for name, first, last in _parts(text.border, end, PAIR)]
        else:
            name = "rejected" if text.weight < 0 else \
                "chosen" if any(other.weight < 0 for other in query.others) else "response"
            found.append(Asked(name, text, 0, end, marked=result.task == "preference"))
    return found


def _parts(
    border: int | None, end: int, names: tuple[str, str]
) -> list[tuple[str, int, int]]:
    """A row's texts by name, each with its first and last + 1 token."""
    return [(names[0], 0, end)] if border is None else \
        [(names[0], 0, border), (names[1], border, end)]


def label_compared(hit: Hit, result: Result) -> str:
    """Whether a hit's label is the query's, in words; empty where either has none, or several."""
    labels, others = ({text.label_name for text in result.query.texts if sign * text.weight > 0}
                      for sign in (1, -1))
    if hit.label is None or len(labels) != 1 or None in labels:
        return ""
    return "like the query's" if hit.label in labels else \
        "the one that it is compared with" if hit.label in others else "unlike the query's"


def said_of(hit: Hit, result: Result) -> str:
    """The label of a hit, and its own log p; empty for next tokens."""
    compared = label_compared(hit, result)
    parts = [] if hit.label is None else [f"label {hit.label}" + f", {compared}" * bool(compared)]
    if hit.log_p is not None and result.task != "causal":
        parts.append(f"its log p {_short(hit.log_p)} nats")
    return ", ".join(parts)


def texts_of(hit: Hit, result: Result) -> list[tuple[str, int, int]]:
    """The texts of a hit: what each is, and its first and last + 1 token."""
    if hit.border is None:
        return [("", 0, len(hit.tokens))]
    names = PAIR if result.task in ("reward", "preference") else SECOND_TEXT
    return _parts(hit.border, len(hit.tokens), names)


def texts_apart(row: Query | Hit) -> list[str]:
    """The texts of tokens, without the space with which decoding parts a row's two texts."""
    pieces = list(row.token_texts if isinstance(row, Query) else row.tokens)
    if row.border is not None and row.border < len(pieces):
        pieces[row.border] = pieces[row.border].removeprefix(" ")
    return pieces


def share_means(result: Result) -> str:
    """What the share of a token is a share of, where it stands."""
    if result.task in ("causal", "preference"):
        return "a token's share belongs to predicting what follows"
    return "a token's share is what the gradient has at its place" + (
        ", a head's at the text's first" * has_head(result))


def has_head(result: Result) -> bool:
    """Whether a head is among the modules that count: it stands behind the last block."""
    # results that were saved before say it by their hits alone
    return HEAD in result.controls.get("kinds", ()) or \
        any(HEAD in hit.kind_influence for hit in result.hits)


def layer_names(result: Result) -> list[str]:
    """What the layers of a result are called: those of the blocks by number, then the head."""
    last = result.layers[-1] if has_head(result) else None
    return ["embeddings" if layer == EMBEDDED else HEAD if layer == last else f"layer {layer}"
            for layer in result.layers]


def numbered_apart(result: Result) -> str:
    """Which numbers of layers are no blocks', to follow the word "layers" where they are chosen."""
    return "".join(f"; {layer} is the {name}" if name == HEAD else f"; {layer} are the {name}"
                   for layer, name in zip(result.layers, layer_names(result), strict=True)
                   if not name.startswith("layer"))


def layers_of(result: Result, to: str = " to ") -> str:
    """The layers of a result in a few words: those of the blocks from first to last."""
    names = layer_names(result)
    blocks = [layer for name, layer in zip(names, result.layers, strict=True)
              if name.startswith("layer")]
    parts = [name for name in names if not name.startswith("layer")]
    if blocks:
        parts.insert(names.index(f"layer {blocks[0]}"), f"layer {blocks[0]}" if len(blocks) == 1
                     else f"layers {blocks[0]}{to}{blocks[-1]}")
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _short(value: float) -> str:
    """Two decimals, or two digits of what is nearer to 0, as a sure classifier's log p.

    >>> _short(-12.345), _short(-0.000534), _short(-0.0)
    ('-12.35', '-0.00053', '0')
    """
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value + 0.0:.2g}"  # −0 is 0
