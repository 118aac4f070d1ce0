"""Which tokens a group of terms names, comparable between expressions: the same ones, never the same, or some.

`f2` of "f2+l2" and `f2` of "f2" differ on short prompts, because prefix and suffix share them out; a `TokenSet` knows.
"""

from dataclasses import dataclass

from .grammar import Term, parse


@dataclass(frozen=True)
class TokenSet:
    """The tokens of some terms; `first` and `last` are the prefix and suffix they share short prompts with."""

    terms: frozenset[Term]
    first: int = 0
    last: int = 0

    @classmethod
    def of(cls, group: str, expression: str) -> "TokenSet":
        """The tokens of a group such as "l2" in its whole expression, such as "f2+l2"."""
        terms = frozenset(parse(group))
        if {Term("prompt"), Term("gen")} <= terms or Term("all") in terms:
            return cls(frozenset({Term("all")}))
        if not any(term.name in ("f", "l") for term in terms):
            return cls(terms)
        counts = {term.name: term.number for term in parse(expression)}
        return cls(terms, counts.get("f", 0), counts.get("l", 0))

    @property
    def everywhere(self) -> bool:
        """Whether it is every token, prompt and generated."""
        return self.terms == {Term("all")}

    def disjoint(self, other: "TokenSet") -> bool:
        """Whether no batch has a token in both."""
        shared = (self.first, self.last) == (other.first, other.last)
        return all(_apart(a, b, shared) for a in self.terms for b in other.terms)

    def __str__(self) -> str:
        shown, names = "+".join(sorted(map(str, self.terms))), {term.name for term in self.terms}
        beside = [f"{n}{count}" for n, count in (("f", self.first), ("l", self.last)) if count and n not in names]
        return f"{shown} beside {beside[0]}" if beside else shown


def _apart(a: Term, b: Term, same_budget: bool) -> bool:
    if "all" in (a.name, b.name):
        return False
    if a.in_prompt != b.in_prompt:
        return True
    if {a.name, b.name} == {"gen:", "gen/"}:
        return {a.name: a, b.name: b}["gen:"].number < {a.name: a, b.name: b}["gen/"].number
    return {a.name, b.name} == {"f", "l"} and same_budget
