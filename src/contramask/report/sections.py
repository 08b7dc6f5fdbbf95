"""The figures of single models: classes, attention, frequencies, representation, invariance."""

from collections.abc import Mapping
from dataclasses import replace

from contramask.analysis.reading import Reading
from contramask.report.canvas import Canvas, caption, only
from contramask.report.depth import Panel, fans, over_depth, profiles
from contramask.report.layers import last_block
from contramask.report.markup import Drawn
from contramask.report.scatter import attention_pictures, tokens

CLASSES = {"class/knn": "k-NN accuracy", "class/ridge": "Ridge accuracy"}
ATTENTION = {
    "attn/distance": "Attention distance",
    "attn/entropy": "Entropy",
    "attn/nmi": "Mutual information",
    "attn/diversity": "Diversity of maps",
    "attn/head_similarity": "Similarity of heads' maps",
    "attn/to_cls": "Attention to class token",
    "attn/to_registers": "Attention to registers",
}
OUTPUTS = {
    "attn/output_similarity_heads": "Outputs of two heads",
    "attn/output_similarity_depths": "Outputs at two depths",
    "attn/output_similarity_positions": "Outputs at two positions",
}
SHAPE = {
    "repr/effective_rank": "Effective rank",
    "repr/std": "Standard deviation",
    "repr/uniformity": "Uniformity",
    "repr/alignment": "Alignment",
    "repr/variance_top10": "Variance in top 10 channels",
}
SPECTRA = {
    "repr/spectrum_image": "Spectrum of images",
    "repr/spectrum_token": "Spectrum of tokens",
    "repr/channel_variance": "Variance of channels",
}
INVARIANCE = {"invariance/flip": "Flip", "invariance/crop": "Crop"}

OVER_DEPTH = "Over the blocks, with 95 % bands over images where they were taken."
DIAMOND = "A diamond is the final norm's output."


def classes(canvas: Canvas) -> list[Drawn]:
    """Accuracy by depth."""
    return _curves(canvas, "classes", CLASSES, "Accuracy by depth", percent=True)


def attention(canvas: Canvas) -> list[Drawn]:
    """Statistics of maps, similarity of outputs, and maps over images."""
    drawn = _curves(canvas, "attention", ATTENTION, "Statistics of attention by depth")
    drawn += _curves(canvas, "attention_outputs", OUTPUTS, "Similarity of outputs of attention")
    pictures = {canvas.names[who[0]]: known for who, known in canvas.study.pictures.items()}
    if any("/" in name for known in pictures.values() for name in known):
        path = attention_pictures(pictures, canvas.file("attention_pictures"))
        text = "Images as the models saw them, and below them lit where attention goes."
        drawn.append(Drawn(path, "Attention over images", text, photo=True))
    return drawn


def frequencies(canvas: Canvas) -> list[Drawn]:
    """High frequencies by depth, and amplitude over frequency."""
    high = {"fourier/high": "Highest frequency"}
    drawn = _curves(canvas, "fourier_high", high, "Amplitude of the highest frequency by depth")
    models = canvas.lines("fourier/log_amplitude")
    if models:
        path = canvas.file("fourier")
        fans(models, path, xlabel="frequency / \u03c0", ylabel="log amplitude")
        titles = {"fourier/log_amplitude": "Log amplitude"}
        text = _caption(canvas, "A line for each layer, dark first, bright last.", titles)
        drawn.append(Drawn(path, "Amplitude over frequency", text))
    return drawn


def representation(canvas: Canvas) -> list[Drawn]:
    """Rank and spread by depth, spectra, tokens in the plane."""
    drawn = _curves(canvas, "representation", SHAPE, "Shape of the representation by depth")
    drawn += _spectra(canvas)
    for name in ("repr/spectrum_image", "repr/spectrum_token"):
        models = canvas.lines(name)
        if models:
            path = canvas.file(name.rpartition("/")[2])
            fans(models, path, xlabel="singular value", ylabel="log, against the largest")
            lead = "A line for each layer, dark first, bright last."
            text = _caption(canvas, lead, {name: SPECTRA[name]})
            drawn.append(Drawn(path, f"{SPECTRA[name]} by depth", text))
    points = {canvas.names[who[0]]: known for who, known in canvas.study.points.items() if known}
    if points:
        path = tokens(points, canvas.file("tokens"))
        text = "Patch tokens in the plane, coloured by the class of their image; axes have no unit."
        drawn.append(Drawn(path, "Tokens in the plane", text))
    return drawn


def invariance(canvas: Canvas) -> list[Drawn]:
    """Cosines against those of other images."""
    lead = "Dashed: the same with another image, which is what the cosine must be held against."
    return _curves(canvas, "invariance", INVARIANCE, "Invariance by depth", lead=lead)


def _curves(
    canvas: Canvas,
    name: str,
    titles: Mapping[str, str],
    alt: str,
    *,
    lead: str = "",
    percent: bool = False,
) -> list[Drawn]:
    """A figure of panels over depth, if any model has one of the readings."""
    panels = canvas.panels(titles, percent=percent)
    if not panels:
        return []
    path = canvas.file(name)
    columns = 2 if len(panels) in (2, 4) else 3
    over_depth(panels, path, canvas.colours, columns=columns, baseline="other images")
    leads = [OVER_DEPTH, lead]
    if any("final" in r.axes["layer"] for p in panels for r in p.lines.values()):
        leads.append(DIAMOND)
    if any(p.dots for p in panels):
        leads.append("Points are single heads.")
    text = _caption(canvas, " ".join(filter(None, leads)), titles)
    return [Drawn(path, alt, text)]


def _spectra(canvas: Canvas) -> list[Drawn]:
    """The last block of every model, side by side."""
    panels: list[Panel] = []
    for name, title in SPECTRA.items():
        last = {m: r for m, known in canvas.lines(name).items() if (r := _in_last_block(known))}
        if last and name == "repr/channel_variance":
            panels.append(Panel(title, last, xlabel="channel, sorted", log="xy"))
        elif last:
            panels.append(Panel(title, last, xlabel="singular value"))
    if not panels:
        return []
    path = profiles(panels, canvas.file("spectra"), canvas.colours)
    return [Drawn(path, "Spectra of the last block", _caption(canvas, "Last block.", SPECTRA))]


def _in_last_block(reading: Reading) -> Reading | None:
    """Without its axis of layers; counted from 1, as a logarithmic axis needs it."""
    label = last_block(reading.axes["layer"])
    if label is None:
        return None
    part = only(reading, "layer", label)
    ((axis, places),) = part.axes.items()
    return replace(part, axes={axis: tuple(str(i + 1) for i in range(len(places)))})


def _caption(canvas: Canvas, lead: str, titles: Mapping[str, str]) -> str:
    known = [canvas.study.readings.get((m,), {}) for m in canvas.study.models]
    return caption(lead, titles, known)
