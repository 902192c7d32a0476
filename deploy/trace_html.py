"""Traces as one HTML file that opens offline, drawn by the viewer of MLflow's notebooks.

The viewer comes with the whole of MLflow: a webpack bundle that loads its chunks from a server and asks it
for traces. Here all of it stands in the page: each chunk as a script or a style that the loader finds in
place, images as ``data:`` URLs, and a ``fetch`` that answers with the traces of the page.

What a trace holds was written by strangers and models. It stands in the page as JSON without any ``<``, and a
content security policy lets no script run but the page's own, by hash, and lets nothing be loaded or sent.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from inference_table.errors import TracelakeError

if TYPE_CHECKING:
    from mlflow.entities import Trace

    from inference_table.table import InferenceRow

__all__ = ["trace_page", "write_page"]

RENDERER: Final = "lib/notebook-trace-renderer/js/ml-model-trace-renderer.*.js"
CHUNK: Final = re.compile(r'"(static/(?:js|css)/[\w.-]+\.(?:js|css))"')
"""How the loader names what it loads."""
MEDIA: Final = re.compile(r'\b[\w$]+\.p\+"(static/media/[\w.-]+\.(svg|png))"')
MEDIA_TYPES: Final = {"svg": "image/svg+xml", "png": "image/png"}
SHIM: Final = """
(() => {
  const traces = JSON.parse(document.getElementById("traces").textContent);
  const query = new URLSearchParams(Object.keys(traces).map((id) => ["trace_id", id])).toString();
  const Parameters = window.URLSearchParams;
  window.URLSearchParams = class URLSearchParams extends Parameters {
    constructor(init) {
      super(typeof init === "string" && init === window.location.search ? query : init);
    }
  };
  window.fetch = async (request) => {
    const url = String(request.url || request);
    const id = new Parameters(url.split("?")[1] || "").get("request_id");
    const found = url.includes("/get-trace-artifact?") && Object.hasOwn(traces, id) ? traces[id] : null;
    const missing = {error_code: "RESOURCE_DOES_NOT_EXIST", message: "This is a file: there is no server."};
    return new Response(JSON.stringify(found || missing), {status: found ? 200 : 404});
  };
})();
"""
"""What stands for the server: the viewer's page has the ids in its address, and asks for each trace."""
STYLE: Final = """
html, body, #root { height: 100%; margin: 0; }
#root > div > div:last-child { display: flex; flex-direction: column; }
#root > div > div:last-child > div:last-child { flex: 1; min-height: 0; }
[data-component-id^="mlflow.notebook.trace-ui"], h4 + span:has(svg) { display: none !important; }
"""
"""The viewer fills the window, not a cell; what points to a server or to notebooks is left out."""


def write_page(row: "InferenceRow", file: Path) -> None:
    """Write the traces of a request as one HTML file that opens offline.

    Raises:
        TracelakeError: there is no trace; the file can't be written; or as :func:`trace_page`.
    """
    main = row.trace()
    id_ = row.get("databricks_request_id")
    if main is None:
        raise TracelakeError(
            f"cannot write the trace of request {id_}: none was recorded for it; "
            "`last --where 'trace_id is not null'` is the newest request that has one"
        )
    document = trace_page([main, *row.other_traces()], f"trace of request {id_}")
    try:
        file.write_text(document, encoding="utf-8")
    except OSError as error:
        raise TracelakeError(f"cannot write {file}: {error.strerror}; give --html another path") from error


def trace_page(traces: Sequence["Trace"], title: str) -> str:
    """One HTML document that shows ``traces``; it needs no server, no network and no other file.

    Args:
        traces: at least one; further ones are pages of the viewer.
        title: of the document.

    Raises:
        TracelakeError: the whole of MLflow is not installed, or lays its viewer out in another way.
    """
    build = viewer_folder()
    entry, *chunks = viewer_files(build)
    styles = [
        f'<style data-href="{path}">{escaped(read(build, path), "style")}</style>'
        for path in chunks
        if path.endswith(".css")
    ]
    sources = [
        SHIM,
        *(with_media(build, path) for path in chunks if path.endswith(".js")),
        read(build, entry),
    ]
    scripts = [escaped(source, "script") for source in sources]
    data = {trace.info.trace_id: trace.data.to_dict() for trace in traces}
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy(scripts)}">',
            f"<title>{html.escape(title)}</title>",
            *styles,
            f'<style>{STYLE}</style>\n</head>\n<body>\n<div id="root"></div>',
            f'<script type="application/json" id="traces">{json_in_html(data)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def viewer_folder() -> Path:
    """Where MLflow keeps what its server serves; found without importing MLflow."""
    spec = find_spec("mlflow")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        build = Path(folder) / "server" / "js" / "build"
        if build.is_dir():
            return build
    raise TracelakeError(
        "cannot write the trace as HTML: the viewer comes with the whole of MLflow, which is not "
        "installed; pip install 'tracelake[ui]'"
    )


def viewer_files(build: Path) -> list[str]:
    """Paths of the viewer's loader and of all that it may load."""
    entries = sorted(build.glob(RENDERER))
    chunks = CHUNK.findall(entries[0].read_text(encoding="utf-8")) if entries else []
    if not chunks or not all((build / path).is_file() for path in chunks):
        raise TracelakeError(
            f"cannot write the trace as HTML: the viewer in {build} is not laid out as that of MLflow 3.17; "
            "install that version, or look at the trace with `tracelake ui`"
        )
    return [str(entries[0].relative_to(build)), *chunks]


def read(build: Path, path: str) -> str:
    # A parser of HTML makes each line break a line feed; the hash of a script is taken of what it makes.
    return (build / path).read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n")


def with_media(build: Path, path: str) -> str:
    """A chunk with the images that it would ask the server for."""

    def inlined(found: re.Match[str]) -> str:
        file = build / found[1]
        if not file.is_file():
            return found[0]
        content = base64.b64encode(file.read_bytes()).decode()
        return f'"data:{MEDIA_TYPES[found[2]]};base64,{content}"'

    return MEDIA.sub(inlined, read(build, path))


def escaped(source: str, tag: str) -> str:
    """Source that does not end its own tag. In JavaScript and CSS these are parts of strings and patterns."""
    return re.sub(rf"<(?=/{tag}|!--)", r"\\x3c" if tag == "script" else r"\\3c ", source, flags=re.IGNORECASE)


def policy(scripts: Sequence[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "font-src data:; media-src data: blob:; form-action 'none'; base-uri 'none'"
    )


def json_in_html(value: Mapping[str, Any]) -> str:
    """JSON that an HTML parser finds nothing in: no end of a script, no comment."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        # JavaScript's JSON has no word for NaN and infinity.
        spelled = json.loads(json.dumps(value), parse_constant=str)
        text = json.dumps(spelled, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
