"""Phrases of a translated text that documents, docstrings, help texts and messages once had stay out."""

import re

import pytest
from quoted_commands import DOCUMENTS, OTHERS, ROOT, SOURCES, strings_of

# Phrase: what to write instead. A short list of what was common; it finds these and nothing else.
PHRASES = {
    r"(?<!there )\b(?:is|are|was|were) no (?!longer|more|less|better|worse|other)[a-z]": "is not a ...",
    r"\bha(?:s|ve) no \w+ that\b": "does not have a ... that",
    r"\b(?:a|one) (?:line|row|column|file|folder|page|module|command|table|figure|name) an? [a-z]": "per",
    r"(?<!many )\b(?:images|steps|megabytes|bytes|figures|operations) an? (?:batch|second|step|gpu)\b": "per",
    r"\bnot to be had\b": "is not available",
    r"\b(?:made|produced|trained|written) otherwise\b": "with different settings",
    r"\bsurest\b": "most confident",
    r"\bmended\b": "fixed",
    r"\bthe way (?:end to end|once|from)\b|\bthe whole way\b": "the pipeline",
    r"\bon the ground of\b": "because of, from",
    r"\bin the mean\b": "on average",
    r"\basked for\b": "requested",
    r"\bstands? (?:in the|there)\b|\blies? there\b": "is in",
    r"\bbeside\b|\bon the spot\b": "next to",
    r"\bsuch as it is\b|\bis to be (?:found|seen|read)\b": "say it directly",
    r"\bgive another\b": "choose another",
}
TEXTS = [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in (*DOCUMENTS, *OTHERS)]
TEXTS += [(f"{path.relative_to(ROOT)}:{line}", text) for path in SOURCES for line, text in strings_of(path)]


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_stays_out(phrase):
    found = [
        f"{where}: {match.group()}"
        for where, text in TEXTS
        for match in re.finditer(phrase, " ".join(text.split()), re.IGNORECASE)
    ]
    assert not found, f"write {PHRASES[phrase]}"
