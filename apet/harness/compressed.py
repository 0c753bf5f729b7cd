"""What turns a model of lmms-eval into a compressed one."""

from typing import Any

from apet.api import compress_model


class Compressed:
    """Put in front of a model class of lmms-eval; takes the budget out of the model arguments.

    Without a budget the model is left as it is: the run to compare with.

    Args:
        tokens: As in `apet.compress_model`, and so the others.
        ratio: Share of the visual tokens.
        speedup: How many times fewer FLOPs.
        target_flops: FLOPs from pixels to the first token.
        method: Registered name; "apet" if it is left out.
        kwargs: Arguments of the model class.

    Raises:
        ValueError: A method without a budget, or as `apet.compress_model`.
    """

    def __init__(
        self,
        *,
        tokens: float | None = None,
        ratio: float | None = None,
        speedup: float | None = None,
        target_flops: float | None = None,
        method: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = {"tokens": tokens, "ratio": ratio, "speedup": speedup, "target_flops": target_flops}
        budget = {name: value for name, value in given.items() if value is not None}
        if method is not None and not budget:
            raise ValueError(f"method={method} has no effect without a budget; add tokens=, ratio= or speedup=")
        super().__init__(**kwargs)
        if budget:
            print(compress_model(self.model, method=method or "apet", **budget).apet)
