"""Random request bodies for the server."""

import random
from functools import cache
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from tests.campaigns.model_folders import valid_folder
from tests.hub.test_serving_requests import FIELDS, random_body
from tests.support.serving import make_app

ANSWERS = (200, 400, 404, 413, 422)


@cache
def client() -> Any:
    """A client of a server of a small model, in this process."""
    app = make_app(str(valid_folder("dfn")), max_new_tokens=4, max_prompt_tokens=200)
    return TestClient(app, raise_server_exceptions=False)


def attempt_requests(folder: Path, random: random.Random) -> None:
    """Post a random body to a route."""
    path = random.choice(list(FIELDS))
    body = random_body(random, path)
    answer = client().post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in ANSWERS, f"{answer.status_code} for {body!r}"
    assert answer.status_code == 200 or isinstance(answer.json(), dict), answer.text


ATTEMPTS = (attempt_requests,)
