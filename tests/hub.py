"""A stand-in of the hub: the part of its HTTP interface that huggingface_hub and datasets ask for, over a folder.

    folder/models/ORG/NAME/...      folder/datasets/ORG/NAME/...

Every repository has one revision, `main`, whose commit is a function of its files. Whoever reads from it names it in
HF_ENDPOINT, before huggingface_hub is imported. Repositories of the organisation `secret`, and all writing, need the token
`Hub.token`. Large files arrive by the protocol of Git LFS (HF_HUB_DISABLE_XET).
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import yaml
from aiohttp import web


class Hub:
    """The address, and the paths that were asked for so far."""

    def __init__(self, folder: Path):
        self.folder, self.asked, self.endpoint = folder, [], ""
        self.token, self.large, self.visibility = "right-token-of-the-test", {}, {}

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._remember], client_max_size=1 << 28)
        for kind, prefix in (("models", ""), ("datasets", "/datasets")):
            api = f"/api/{kind}/{{org}}/{{name}}"
            application.router.add_get(api, self._info, name=f"{kind}-info")
            application.router.add_get(f"{api}/revision/{{revision}}", self._info)
            application.router.add_get(f"{api}/tree/{{revision}}", self._tree)
            application.router.add_get(f"{api}/tree/{{revision}}/{{path:.*}}", self._tree)
            application.router.add_post(f"{api}/paths-info/{{revision}}", self._paths_info)
            application.router.add_get(f"{prefix}/{{org}}/{{name}}/resolve/{{revision}}/{{path:.*}}", self._file)
            application.router.add_post(f"{api}/preupload/{{revision}}", self._modes)
            application.router.add_post(f"{api}/commit/{{revision}}", self._commit)
        application.router.add_get("/api/whoami-v2", self._who)
        application.router.add_post("/api/repos/create", self._create)
        application.router.add_post("/api/validate-yaml", self._validate)
        application.router.add_post("/{org}/{name}.git/info/lfs/objects/batch", self._batch)
        application.router.add_put("/large/{oid}", self._store)
        return application

    @web.middleware
    async def _remember(self, request: web.Request, handler) -> web.StreamResponse:
        self.asked.append(request.path)
        return await handler(request)

    def _repository(self, request: web.Request) -> tuple[Path, str]:
        """Its folder and its commit. A 404 as the hub words it."""
        kind = "datasets" if "datasets" in request.path.split("/")[1:3] else "models"
        folder = self.folder / kind / request.match_info["org"] / request.match_info["name"]
        if request.match_info["org"] == "secret":
            self._require_token(request)
        if not folder.is_dir():
            raise _missing("RepoNotFound", "Repository not found")
        commit = commit_of(folder)
        if request.match_info.get("revision", "main") not in ("main", commit):
            raise _missing("RevisionNotFound", "Invalid rev id")
        return folder, commit

    async def _info(self, request: web.Request) -> web.Response:
        folder, commit = self._repository(request)
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files_of(folder)]
        name = f"{request.match_info['org']}/{request.match_info['name']}"
        told = {"_id": commit[:24], "id": name, "sha": commit, "siblings": siblings}
        return web.json_response(
            told | {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0}
        )

    async def _tree(self, request: web.Request) -> web.Response:
        folder, commit = self._repository(request)
        below = folder / request.match_info.get("path", "")
        if not below.is_dir():
            raise _missing("EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        deep = request.query.get("recursive", "false").lower() == "true"
        found = sorted(below.rglob("*") if deep else below.iterdir())
        return web.json_response([_entry(folder, path) for path in found])

    async def _paths_info(self, request: web.Request) -> web.Response:
        folder, _ = self._repository(request)
        form = await request.post()
        wanted = form.getall("paths", []) if form else (await request.json())["paths"]
        found = [folder / path for path in wanted]
        return web.json_response([_entry(folder, path) for path in found if path.exists()])

    async def _file(self, request: web.Request) -> web.StreamResponse:
        folder, commit = self._repository(request)
        file = folder / request.match_info["path"]
        if not file.is_file():
            raise _missing("EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        return web.FileResponse(file, headers={"ETag": f'"{digest_of(file)}"', "X-Repo-Commit": commit})

    # --- writing --------------------------------------------------------------------------------------------------

    def _require_token(self, request: web.Request) -> None:
        given = request.headers.get("Authorization")
        if given != f"Bearer {self.token}":
            message = (
                "Invalid username or password." if given is None else "Invalid credentials in Authorization header"
            )
            raise web.HTTPUnauthorized(headers={"X-Error-Message": message})

    async def _who(self, request: web.Request) -> web.Response:
        self._require_token(request)
        return web.json_response({"type": "user", "name": "ann", "orgs": [{"name": "acme"}]})

    async def _create(self, request: web.Request) -> web.Response:
        self._require_token(request)
        asked = await request.json()
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            raise web.HTTPForbidden(headers={"X-Error-Message": "You don't have the rights to create a model"})
        if (self.folder / "models" / name).is_dir():
            return web.json_response({"url": f"{self.endpoint}/{name}", "id": name}, status=409)
        (self.folder / "models" / name).mkdir(parents=True)
        self.visibility[name] = asked.get("visibility")
        return web.json_response({"url": f"{self.endpoint}/{name}", "name": name, "id": name})

    async def _validate(self, request: web.Request) -> web.Response:
        """Of a card: its front matter is YAML with a licence."""
        front = yaml.safe_load((await request.json())["content"].split("---")[1])
        errors = [] if front.get("license") else [{"message": "license is missing"}]
        return web.json_response({"errors": errors, "warnings": []}, status=400 if errors else 200)

    async def _modes(self, request: web.Request) -> web.Response:
        self._require_token(request)
        files = [file["path"] for file in (await request.json())["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
        told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return web.json_response({"files": told})

    async def _batch(self, request: web.Request) -> web.Response:
        self._require_token(request)
        objects = (await request.json())["objects"]
        actions = [{"upload": {"href": f"{self.endpoint}/large/{one['oid']}"}} for one in objects]
        return web.json_response({"objects": [one | {"actions": do} for one, do in zip(objects, actions, strict=True)]})

    async def _store(self, request: web.Request) -> web.Response:
        self.large[request.match_info["oid"]] = content = await request.read()
        assert hashlib.sha256(content).hexdigest() == request.match_info["oid"]
        return web.Response()

    async def _commit(self, request: web.Request) -> web.Response:
        self._require_token(request)
        folder, _ = self._repository(request)
        for line in (await request.read()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self._write(folder / value["path"], base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                self._write(folder / value["path"], self.large[value["oid"]])
        commit, name = commit_of(folder), folder.relative_to(self.folder / "models")
        told = {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{name}/commit/{commit}"}
        return web.json_response(told | {"hookOutput": ""})

    @staticmethod
    def _write(file: Path, content: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _missing(code: str, message: str, headers: dict[str, str] | None = None) -> web.HTTPNotFound:
    return web.HTTPNotFound(headers={"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})


def _entry(folder: Path, path: Path) -> dict:
    kind = "directory" if path.is_dir() else "file"
    size, digest = (0, "0" * 40) if path.is_dir() else (path.stat().st_size, digest_of(path))
    return {"type": kind, "path": str(path.relative_to(folder)), "size": size, "oid": digest}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digest_of(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def commit_of(folder: Path) -> str:
    named = "".join(f"{file.relative_to(folder)} {digest_of(file)}\n" for file in files_of(folder))
    return hashlib.sha1(named.encode()).hexdigest()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """The hub of a folder on a free port of 127.0.0.1, in a thread."""
    hub, loop = Hub(folder), asyncio.new_event_loop()
    runner = web.AppRunner(hub.application())

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub.endpoint = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield hub
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
