"""The page: a picture, a question, a budget and two methods on the left, two answers on the right."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from apet.demo.answers import DEFAULT_METHODS, Asker, Shown, choices

QUESTION = "What is in the picture?\nAnswer the question using a single word or phrase."
# Fonts of the system: the default theme's would be fetched from a server.
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
_HEAD = """## What ApET keeps

Model **{model}**, {tokens} visual tokens per image. Everything runs on this machine. Drop a picture, ask, slide the
budget. Patches that are not faded reach the last layer of the decoder; patches of one tint were merged into one token.
"""


def build(asker: Asker, examples: Sequence[Sequence[str]]) -> gr.Blocks:
    """The page.

    Args:
        asker: The model side.
        examples: (image file, question) rows to click; the first one is there at the start.
    """
    first = examples[0] if examples else (None, QUESTION)
    with gr.Blocks(title="ApET", analytics_enabled=False) as page:
        gr.Markdown(_HEAD.format(model=asker.model_id, tokens=asker.tokens))
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(first[0], type="filepath", label="picture", elem_id="picture", height=300)
                question = gr.Textbox(first[1], label="question", elem_id="question", lines=3)
                tokens = gr.Slider(
                    1, asker.tokens - 1, min(64, asker.tokens // 2), step=1, elem_id="tokens",
                    label="visual tokens, averaged over the decoder layers",
                )  # fmt: skip
                methods = [
                    gr.Dropdown(choices(), value=name, label=f"method {number}", elem_id=f"method{number}")
                    for number, name in enumerate(DEFAULT_METHODS, start=1)
                ]
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                if len(examples) > 1:
                    gr.Examples([list(example) for example in examples], [picture, question])
            panels = [_panel(number) for number in (1, 2)]
        for method, outputs in zip(methods, panels, strict=True):
            inputs = [picture, question, method, tokens]
            events = [button.click, tokens.release, method.input, question.submit, page.load, picture.change]
            # What is changed while an answer is being computed is answered afterwards, not dropped.
            gr.on(
                events, _answer(asker), inputs, outputs, concurrency_id="model", api_visibility="private",
                trigger_mode="always_last",
            )  # fmt: skip
    return page


def launch(page: gr.Blocks, port: int | None) -> None:
    """Serve the page on this machine only, until it is interrupted."""
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
        theme=gr.themes.Base(**_FONTS), footer_links=[],
    )  # fmt: skip
    print(f"open {address} in a browser; Ctrl-C ends it")
    page.block_thread()


def _panel(number: int) -> list[Any]:
    """The outputs of one method."""
    with gr.Column(scale=3):
        return [
            gr.Textbox(label=f"answer {number}", elem_id=f"answer{number}"),
            gr.Image(label="kept patches", interactive=False, elem_id=f"kept{number}", height=330),
            gr.Image(label="merge groups", interactive=False, elem_id=f"groups{number}", height=330),
            gr.Markdown(elem_id=f"facts{number}"),
        ]


def _answer(asker: Asker):
    """The event: an answer, or the sentence that says why there is none."""

    def answer(picture: str | None, question: str, method: str, tokens: int) -> tuple[Any, ...]:
        if picture is None or not question.strip():
            return "", None, _hidden(None), "Drop a picture and ask a question."
        try:
            shown = asker(picture, question.strip(), method, int(tokens))
        except ValueError as error:
            return "", None, _hidden(None), str(error)
        return shown.answer, shown.kept, _hidden(shown.groups), _facts(shown)

    return answer


def _hidden(picture: Any) -> Any:
    """The picture, or no panel at all where there is none."""
    return gr.update(value=picture, visible=picture is not None)


def _facts(shown: Shown) -> str:
    return "\n".join(f"- {name}: **{value}**" for name, value in shown.facts)
