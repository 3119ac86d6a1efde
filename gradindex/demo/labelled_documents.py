"""Documents of the standard library, each labelled with what its module is for; some wrongly."""

import hashlib
from typing import Any, TypedDict

from gradindex import draws
from gradindex.demo.library_documents import Document

FAMILIES = {
    "network": "email ftplib http imaplib ipaddress mailbox poplib smtplib socket socketserver ssl "
               "telnetlib urllib wsgiref xmlrpc",
    "numbers": "_pydatetime _pydecimal bisect calendar colorsys datetime decimal fractions hashlib "
               "heapq hmac numbers random secrets statistics time zoneinfo _strptime",
    "processes": "asyncio concurrent contextvars multiprocessing queue sched selectors signal "
                 "subprocess threading",
    "text": "argparse configparser csv difflib getopt gettext html json locale optparse plistlib "
            "pprint re reprlib shlex string textwrap tomllib xml",
}
SHORTEST = 120  # characters; anything shorter may be of any family


class LabelledDocument(TypedDict):
    """A document with its label, which is that of its `family` unless it was `planted`."""

    id: str
    text: str
    label: str
    family: str
    planted: bool
    module: str


def labelled_documents(
    everything: list[Document], tokenizer: Any, count: int, longest: int, seed: int
) -> tuple[list[LabelledDocument], list[LabelledDocument]]:
    """`count` of the documents, of at most `longest` tokens, as evenly of each family as there are.

    Behind them up to an eighth as many others, to see how well those are told apart.
    """
    family_of = {module: family for family, modules in FAMILIES.items()
                 for module in modules.split()}
    of_family: dict[str, list[LabelledDocument]] = {family: [] for family in FAMILIES}
    for document in everything:
        family = family_of.get(document["module"].split(".")[0])
        if family is not None and len(document["text"]) >= SHORTEST and \
                len(tokenizer(document["text"], verbose=False).input_ids) <= longest:
            of_family[family].append(LabelledDocument(
                id=document["id"], text=document["text"], label=family, family=family,
                planted=False, module=document["module"]))
    for members in of_family.values():
        members.sort(key=lambda one: hashlib.sha256(f"{seed}:{one['id']}".encode()).digest())
    # in turns, so that a family that has few of them leaves its part to the others
    turns = _in_turns(list(of_family.values()))
    return turns[:count], turns[count : count + count // 8]


def _in_turns(lists: list[list[LabelledDocument]]) -> list[LabelledDocument]:
    longest = max(map(len, lists))
    return [one[turn] for turn in range(longest) for one in lists if turn < len(one)]


def plant(documents: list[LabelledDocument], share: float, seed: int) -> list[LabelledDocument]:
    """The documents, a `share` of them with another family's label."""
    random = draws.generator(draws.Stream.DEMO_LABELS, seed)
    wrong = set(random.choice(len(documents), round(share * len(documents)),
                              replace=False).tolist())
    planted = []
    for number, document in enumerate(documents):
        if number in wrong:
            others = [family for family in FAMILIES if family != document["family"]]
            label = others[int(random.integers(len(others)))]
            document = {**document, "label": label, "planted": True}
        planted.append(document)
    return planted
