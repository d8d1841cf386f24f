"""For the reference: gives each argument a line of its own where a docstring has several in one, three spaces apart."""

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^( *)(\S.*?) {3}(?=\w[\w, ]*: )", re.MULTILINE)


def split(text: str) -> str:
    while (divided := SEVERAL.sub(r"\1\2\n\1", text)) != text:
        text = divided
    return text


class OneALine(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = split(obj.docstring.value)
