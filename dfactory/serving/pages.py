"""The files of a web page, from dfactory/assets: HTML, style and scripts that load nothing from elsewhere.

The browser enforces it: the page may run its own scripts only, ask this server only, and stand in no frame. What a model
wrote reaches the page as JSON and is shown as text.
"""

from importlib import resources

from aiohttp import web

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page:
    """The files of assets/NAME: index.html at `/`, the others at `/page/FILE`, and those of assets/shared with them."""

    def __init__(self, name: str):
        assets = resources.files("dfactory") / "assets"
        self.files: dict[str, tuple[str, str]] = {}  # path -> type, text
        for folder in (assets / "shared", assets / name):
            for file in folder.iterdir():
                suffix = "." + file.name.rpartition(".")[2]
                path = "/" if file.name == "index.html" else f"/page/{file.name}"
                self.files[path] = TYPES[suffix], file.read_text(encoding="utf-8")

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self.files)

    def add_to(self, app: web.Application) -> None:
        for path in self.files:
            app.router.add_get(path, self._file)

    async def _file(self, request: web.Request) -> web.Response:
        kind, text = self.files[request.path]
        return web.Response(text=text, content_type=kind, charset="utf-8", headers=HEADERS)
