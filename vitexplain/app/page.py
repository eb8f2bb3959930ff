"""The page: what is on it, and what happens when something is chosen. Imported when the app starts, with Gradio."""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..comparison.run import METHODS
from ..comparison.views import VIEWS
from ..data.scenes import SPLITS, make_scene
from ..errors import ExplanationWarning, InputError, VitExplainError, is_out_of_memory
from ..files import save_arrays
from ..registry import method_info
from .fragments import figures_html, maps_html, preview_html
from .limits import Limits, read_upload
from .option_form import Control, configured, controls_of, offered_methods
from .session import Session
from .shelf import SUGGESTIONS, Shelf
from .uploads import Uploads

_EXAMPLES = 6
_WEIGHTS = [".safetensors", ".pt", ".pth", ".bin"]


@contextmanager
def told() -> Iterator[None]:
    """Our errors and warnings as messages on the visitor's page; what was there before stays."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExplanationWarning)
        try:
            yield
        except VitExplainError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error
        except (MemoryError, RuntimeError) as error:  # torch's own, on the CPU, is a plain RuntimeError
            if not is_out_of_memory(error):
                raise
            raise gr.Error("out of memory: choose a smaller model or fewer methods", print_exception=False) from error
    for each in caught:
        if issubclass(each.category, ExplanationWarning):
            gr.Warning(html.escape(str(each.message)))


class _Blocks(gr.Blocks):  # type: ignore[misc]  # Gradio is not typed here
    """What a program sends in place of an upload is refused by a message; Gradio would log it and say nothing."""

    async def preprocess_data(self, *arguments: Any, **named: Any) -> Any:
        try:
            return await super().preprocess_data(*arguments, **named)
        except ValueError as error:  # Gradio's, of paths that nobody uploaded, and pydantic's are such
            raise gr.Error(
                "what was sent is no file that was uploaded to this app, or not of the form that the page sends: "
                "reload the page, and choose the file again",
                print_exception=False,
            ) from error


class Page:
    """The page and its events.

    Args:
        shelf: models at hand.
        limits: of uploads.
        uploads: files of visitors.
    """

    def __init__(self, shelf: Shelf, limits: Limits, uploads: Uploads) -> None:
        self.shelf, self.limits, self.uploads = shelf, limits, uploads
        self.examples = [_example(index) for index in SPLITS["test"][:_EXAMPLES]]
        self.controls: list[tuple[Control, Any]] = []

    def build(self) -> gr.Blocks:
        """Lays the page out and ties its events."""
        blocks = _Blocks(title="vitexplain", analytics_enabled=False, delete_cache=(60, 900))
        with blocks:
            self.session = gr.State(None, time_to_live=3600)
            gr.Markdown("# Why this class?\nMethods side by side, on one picture and one model.")
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=320):
                    self._lay_out_choices()
                with gr.Column(scale=5, min_width=480):
                    self._lay_out_results()
            self._tie(blocks)
        return blocks

    def _lay_out_choices(self) -> None:
        megabytes = self.limits.image_bytes / 1e6
        self.file = gr.File(label=f"Picture, at most {megabytes:g} MB", file_types=["image"], height=150)
        self.gallery = gr.Gallery(
            [Image.open(io.BytesIO(content)) for content, _ in self.examples],
            label="Or an example",
            columns=_EXAMPLES // 2,
            height=230,
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
        )
        self.preview = gr.HTML()
        self.model = gr.Dropdown(list(SUGGESTIONS), value=SUGGESTIONS[0], label="Model", allow_custom_value=True)
        with gr.Accordion("Weights of your own", open=False):
            self.checkpoint = gr.File(label="Checkpoint for the model named above", file_types=_WEIGHTS, height=150)
        self.classes = gr.CheckboxGroup([], label="Classes to explain")
        self.named = gr.Textbox("", label="Another class", placeholder="its name, or its index", max_lines=1)
        self.methods = gr.Dropdown(
            [(method_info(name).title, name) for name in offered_methods()],
            value=list(METHODS[:3]),
            multiselect=True,
            label="Methods",
        )
        self.groups = {}
        with gr.Accordion("Options of the methods", open=False):
            for name in offered_methods():
                with gr.Group(visible=name in METHODS[:3]) as self.groups[name]:
                    gr.Markdown(f"**{method_info(name).title}**")
                    self.controls += [(each, getattr(gr, each.kind)(**each.settings)) for each in controls_of(name)]
        self.explain = gr.Button("Explain", variant="primary")

    def _lay_out_results(self) -> None:
        with gr.Row():
            self.view = gr.Dropdown(list(VIEWS), value=VIEWS[0], label="View", min_width=140)
            self.smooth = gr.Checkbox(True, label="Smooth between patches", min_width=140)
            self.shared = gr.Checkbox(False, label="One range for all classes", min_width=140)
        self.maps = gr.HTML()
        with gr.Row():
            self.measure = gr.Button("Measure faithfulness")
            self.prepare = gr.Button("Make files to download")
        self.figures = gr.HTML()
        self.files = gr.File(label="Files", file_count="multiple", interactive=False, visible=False)

    def _tie(self, blocks: gr.Blocks) -> None:
        chosen = [self.session, self.preview, self.classes]
        style: list[Any] = [self.view, self.smooth, self.shared]
        # one at a time: a model is captured by one visitor, and warnings are caught for the whole process
        on_model: Any = {"concurrency_limit": 1, "concurrency_id": "model"}
        blocks.load(self._begin, self.session, chosen, api_name="begin", **on_model)
        uploaded = self.file.upload(self._take_upload, [self.session, self.file], chosen, api_name="upload", **on_model)
        for after in (uploaded.success, uploaded.failure):  # room for the next one, also after a mishap
            after(lambda: None, None, self.file, api_visibility="private")
        self.gallery.select(self._take_example, self.session, chosen, api_visibility="private", **on_model)
        for event in (self.model.input, self.checkpoint.upload, self.checkpoint.clear):
            event(
                self._take_model,
                [self.session, self.model, self.checkpoint],
                chosen,
                api_visibility="private",
                **on_model,
            )
            event(lambda: "", None, self.named, api_visibility="private")  # the other model may have no such class
        self.methods.change(self._show_options, self.methods, list(self.groups.values()), api_visibility="private")
        gr.on(
            [self.explain.click, self.named.submit],
            self._explain,
            [self.session, self.methods, self.classes, *style, self.named, *(each for _, each in self.controls)],
            [self.session, self.maps, self.figures, self.files],
            api_name="explain",
            **on_model,
        )
        for control in style:
            control.input(self._draw, [self.session, *style], self.maps, api_visibility="private", **on_model)
        self.measure.click(self._measure, self.session, self.figures, api_name="measure", **on_model)
        self.prepare.click(self._make_files, self.session, self.files, api_name="files", **on_model)
        blocks.unload(self._leave)

    def _begin(self, session: Session | None) -> tuple[Session, str, Any]:
        with told():
            first = session or Session(self.shelf.model(SUGGESTIONS[0]), self.limits)
        return self._with_picture(first, *self.examples[0])

    def _take_upload(self, session: Session | None, file: str | None, request: gr.Request) -> tuple[Session, str, Any]:
        with told():
            if not file:
                raise InputError("no picture was sent: choose one")
            self.uploads.note(str(request.session_hash), file)
            content = read_upload(file, self.limits)
        return self._with_picture(session, content, Path(file).name)

    def _take_example(self, session: Session | None, event: gr.SelectData) -> tuple[Session, str, Any]:
        return self._with_picture(session, *self.examples[event.index])

    def _take_model(
        self, session: Session | None, name: str, checkpoint: str | None, request: gr.Request
    ) -> tuple[Session, str, Any]:
        with told():
            known = _known(session)  # before seconds are spent on a model
            if checkpoint is None:
                model = self.shelf.model(name)
            else:
                self.uploads.note(str(request.session_hash), checkpoint)
                model = self.shelf.with_weights(name, checkpoint)
            return self._shown(known.with_model(model))

    def _explain(
        self,
        session: Session | None,
        methods: Sequence[str],
        classes: Sequence[int],
        view: str,
        smooth: bool,
        shared: bool,
        named: str,
        *options: Any,
    ) -> tuple[Session, str, str, Any]:
        with told():
            known = _known(session)
            made = known.compared(
                configured(methods, [control for control, _ in self.controls], options), known.chosen(classes, named)
            )
            return made, maps_html(made.made(), view, smooth, shared), "", gr.update(value=None, visible=False)

    def _draw(self, session: Session | None, view: str, smooth: bool, shared: bool) -> str:
        with told():
            comparison = _known(session).comparison
            return "" if comparison is None else maps_html(comparison, view, smooth, shared)

    def _measure(self, session: Session | None) -> str:
        with told():
            return figures_html(_known(session).made())

    def _make_files(self, session: Session | None, request: gr.Request) -> Any:
        with told():
            comparison = _known(session).made()
            folder = self.uploads.own_folder(str(request.session_hash))
            scores = {method: each.scores for (_, method), each in comparison.explanations.items()}
            files = [
                comparison.save(folder / "comparison.html", cost=False),
                comparison.save(folder / "comparison.png"),
            ]
            files.append(save_arrays(scores, folder / "scores.npz"))
            return gr.update(value=[str(file) for file in files], visible=True)

    def _show_options(self, methods: Sequence[str]) -> list[Any]:
        return [gr.update(visible=name in methods) for name in self.groups]

    def _leave(self, request: gr.Request) -> None:
        self.uploads.forget(str(request.session_hash))

    def _with_picture(self, session: Session | None, content: bytes, name: str) -> tuple[Session, str, Any]:
        with told():
            return self._shown(_known(session).with_picture(content, name))

    def _shown(self, session: Session) -> tuple[Session, str, Any]:
        """A session, its picture, and the classes to choose from, the most probable one chosen."""
        choices = [(f"{name} {probability:.0%}", index) for index, name, probability in session.probable]
        preview = "" if session.content is None else preview_html(session.preview(), session.name)
        return session, preview, gr.update(choices=choices, value=[index for _, index in choices[:1]])


def _known(session: Session | None) -> Session:
    """The session of a page that began. A new one in its place would have another model than the page shows.

    Raises:
        InputError: it is not kept any longer.
    """
    if session is None:
        raise InputError("this page has expired, its picture and model are no longer kept: reload the page")
    return session


def _example(index: int) -> tuple[bytes, str]:
    """A scene with two objects as a PNG file, and what is on it."""
    scene = make_scene(index, num_objects=2)
    stream = io.BytesIO()
    Image.fromarray(scene.image).save(stream, format="PNG")
    return stream.getvalue(), " and ".join(scene.names)
