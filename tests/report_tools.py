"""Predictions to make reports of, and a parser to look at them."""

from html.parser import HTMLParser

from gp_jax.evaluation.results import Prediction

VOID = {"meta", "img", "input", "br", "link", "hr"}
NASTY = "</script><img src=x onerror=alert(1)> \"quoted\" & 'so' $x$ \u8d64\u3044"


def made(sample: str, plan: str, prediction: str, **changes) -> Prediction:
    values = dict(kept=64, total=64, prefill_retention=1.0, metrics={"exact_match": float(prediction == "red")}, family="color")
    values |= dict(seconds={"vision": 0.1, "decode": 0.3, "compile": 9.0}) | changes
    values = {"task": "scenes"} | values
    return Prediction(sample=sample, plan=plan, question="which color?", answer="red", prediction=prediction, **values)


PREDICTIONS = [
    made("1", "dense", "red"),
    made("2", "dense", "Red."),
    made("3", "dense", "red", family="text", total=32, kept=32),
    made("1", "cut", "red", kept=16, prefill_retention=0.5, seconds={"vision": 0.1, "decode": 0.1}),
    made("2", "cut", "red", kept=0, prefill_retention=0.5, seconds={"vision": 0.1, "decode": 0.3}),
    made("4", "cut", "blue", family="text", total=32, kept=4, prefill_retention=0.25, seconds={}),
]


class Page(HTMLParser):
    """Opens and closes every element, and keeps what there is to check."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.errors = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        self.errors += [f"{tag}: {names}"] if len(names) != len(set(names)) else []
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}>")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag, **wanted):
        return [found for name, found in self.tags if name == tag and all(found.get(k.rstrip("_")) == v for k, v in wanted.items())]
