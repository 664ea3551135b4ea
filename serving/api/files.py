"""/v1/files: files of requests that clients upload, and of answers that batches bring; each tenant sees its own."""

import asyncio

from fastapi import APIRouter, Depends, Request
from starlette.responses import FileResponse, Response

from serving.access.gate import Caller, needs
from serving.api.answers import DeletedFile, File, Files
from serving.api.pages import PAGES, page_of
from serving.api.routes import READS, ends, service_of
from serving.api.sending import answer
from serving.batches import multipart
from serving.batches.store import MOST_FILE_BYTES, PURPOSES, Store
from serving.errors import ApiError

router = APIRouter()
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}
JSON_LINES = "application/jsonl"
LINES = {200: {"content": {JSON_LINES: {"schema": {"type": "string"}}}}}
PURPOSE = {"name": "purpose", "in": "query", "required": False, "schema": {"type": "string", "maxLength": 64}}


def store_of(request: Request) -> Store:
    """Where files and batches are. Raises ApiError 404 for a server that keeps none."""
    batches = service_of(request).batches
    if batches is None:
        raise ApiError(404, "this server keeps no files", code="not_found")
    return batches.store


@router.post("/v1/files", response_model=File, responses=ends(*READS, 404, 408, 413, 415), openapi_extra=FORM)
async def upload(request: Request, caller: Caller = Depends(needs("files"))):  # noqa: B008
    """Keeps a file of requests, one JSON object a line, for batches."""
    store = store_of(request)
    path = store.incoming()
    try:
        boundary = await multipart.receive(request, path, MOST_FILE_BYTES)
        form = await asyncio.to_thread(multipart.read_form, path, boundary, MOST_FILE_BYTES)
        purpose = form.fields.get("purpose")
        if purpose not in PURPOSES:
            told = f"purpose={(purpose or '')[:64]!r} is not supported: {', '.join(PURPOSES)} is"
            raise ApiError(400, told, param="purpose", code="invalid_value")
        if strange := sorted(form.fields.keys() - {"purpose"}):
            told = f"unrecognized field {strange[0][:64]}; there are: file, purpose"
            raise ApiError(400, told, param=strange[0][:64], code="unknown_parameter")
        if form.start == form.end:
            raise ApiError(400, "the file is empty", param="file", code="invalid_value")
        place = form.start, form.end, form.filename, purpose
        return answer(File(**await asyncio.to_thread(store.add_file, caller.identity.tenant, path, *place)))
    finally:
        await asyncio.to_thread(path.unlink, missing_ok=True)


@router.get(
    "/v1/files", response_model=Files, responses=ends(*READS, 404), openapi_extra={"parameters": [*PAGES, PURPOSE]}
)
async def files(request: Request, caller: Caller = Depends(needs("files"))):  # noqa: B008
    """The caller's files, the newest first."""
    found = await asyncio.to_thread(store_of(request).files, caller.identity.tenant)
    if purpose := request.query_params.get("purpose"):
        found = [file for file in found if file["purpose"] == purpose]
    page, more = page_of(request, found, ("purpose",))
    data = [File(**file) for file in page]
    ids = {"first_id": data[0].id, "last_id": data[-1].id} if data else {}
    return answer(Files(data=data, has_more=more, **ids))


@router.get("/v1/files/{id}", response_model=File, responses=ends(*READS, 404))
async def file(request: Request, id: str, caller: Caller = Depends(needs("files"))):  # noqa: B008
    """What is told of one of them."""
    return answer(File(**await asyncio.to_thread(store_of(request).file, caller.identity.tenant, id)))


@router.get("/v1/files/{id}/content", response_class=Response, responses=ends(*READS, 404) | LINES)
async def content(request: Request, id: str, caller: Caller = Depends(needs("files"))):  # noqa: B008
    """What is in it."""
    path = await asyncio.to_thread(store_of(request).content, caller.identity.tenant, id)
    return FileResponse(path, media_type=JSON_LINES, headers={"Cache-Control": "no-store"})


@router.delete("/v1/files/{id}", response_model=DeletedFile, responses=ends(*READS, 404, 409))
async def delete(request: Request, id: str, caller: Caller = Depends(needs("files"))):  # noqa: B008
    """Removes it; not while a batch that is not over reads it."""
    await asyncio.to_thread(store_of(request).delete_file, caller.identity.tenant, id)
    return answer(DeletedFile(id=id))
