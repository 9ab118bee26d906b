"""A trajectory file, for reading."""

from __future__ import annotations

import json
from pathlib import Path

from plt_eval.errors import UserError
from plt_eval.tables import visible


def trajectory_text(path: Path) -> str:
    """Every message in its order, with what each model call cost. Raises UserError for a file that is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        info, messages = data["info"], data["messages"]
        parts = [f"=== {path.name}: {info['exit_status']} after {info['model_stats']['api_calls']} model calls ==="]
        step = 0
        for message in messages:
            extra = message.get("extra") or {}
            title = message["role"]
            if title == "assistant":
                step += 1
                title = f"step {step}: assistant"
                if extra.get("prompt_tokens") is not None:
                    title += f" ({extra['prompt_tokens']} tokens read, {extra['completion_tokens']} written"
                    left_out = extra.get("left_out_messages")
                    title += f", {left_out} earlier messages left out)" if left_out else ")"
            if "model_response" in extra:
                parts += ["--- assistant (not in the form asked for) ---", str(extra["model_response"])]
            parts += [f"--- {title} ---", str(message.get("content") or "")]
        return visible("\n".join(parts))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no readable trajectory ({type(error).__name__}: {error})") from error
