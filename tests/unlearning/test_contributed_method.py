"""The unlearning method of CONTRIBUTING.md keeps what every method promises."""

from __future__ import annotations

from typing import Any, ClassVar

import contributing
from method_cases import MethodCases

from peft_ext.unlearning import Request


class TestHalves(MethodCases):
    """The cases that every unlearning method's tests inherit."""

    method = contributing.defined("An unlearning method", "Halves")
    options: ClassVar[dict[str, Any]] = {"epochs": 1.0}
    wrong: ClassVar[list[dict[str, Any]]] = [{"share": 0.0}, {"share": 1.5}, {"epochs": 0.0}]
    trains = True

    def test_it_uses_a_part(self, request_: Request) -> None:
        data = self.make().data(request_)
        assert len(data) == round(0.5 * len(request_.retain))  # type: ignore[arg-type]
        assert data.indices == self.make().data(request_).indices  # type: ignore[attr-defined]
