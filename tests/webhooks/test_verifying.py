"""What the documentation tells receivers to do: its snippets run, on messages that `standardwebhooks` signs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from standardwebhooks import Webhook

SECRET = "whsec_" + "QUJD" * 11
OTHER = "whsec_" + "REVG" * 11
BODY = '{"type":"job.succeeded","data":{"prompt":"ein Fuchs im Schnee: ❄"}}'
PAGE = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text(encoding="utf-8")

#: How a snippet is run: program, what stands before it, and what calls it with a list of [body, headers, secret].
_RUN: Final = {
    "python": (
        sys.executable,
        "",
        "import json, sys\nprint(json.dumps([verify(b.encode(), h, s) for b, h, s in json.load(open(sys.argv[1]))]))",
    ),
    "javascript": (
        "node",
        "",
        "const cases = JSON.parse(require('node:fs').readFileSync(process.argv[2]));\n"
        "console.log(JSON.stringify(cases.map(([b, h, s]) => verify(Buffer.from(b), h, s))));",
    ),
    "php": (
        "php",
        "<?php\n",
        "$cases = json_decode(file_get_contents($argv[1]), true);\n"
        "echo json_encode(array_map(fn($c) => verify($c[0], $c[1], $c[2]), $cases));",
    ),
    "ruby": (
        "ruby",
        "require 'json'\n",
        "puts JSON.generate(JSON.parse(File.read(ARGV[0])).map { |b, h, s| verify(b, h, s) })",
    ),
    "go": (
        "go",
        "package main\nimport (\n"
        + "".join(
            f'"{name}"\n'
            for name in (
                "crypto/hmac",
                "crypto/sha256",
                "encoding/base64",
                "encoding/json",
                "fmt",
                "net/http",
                "os",
                "strconv",
                "strings",
                "time",
            )
        )
        + ")\n",
        "func main() {\n"
        "\tvar cases [][]json.RawMessage\n\tdata, _ := os.ReadFile(os.Args[1])\n\tjson.Unmarshal(data, &cases)\n"
        "\tfound := []bool{}\n\tfor _, c := range cases {\n"
        "\t\tvar body, secret string\n\t\tvar plain map[string]string\n\t\theaders := http.Header{}\n"
        "\t\tjson.Unmarshal(c[0], &body)\n\t\tjson.Unmarshal(c[1], &plain)\n\t\tjson.Unmarshal(c[2], &secret)\n"
        "\t\tfor name, value := range plain {\n\t\t\theaders.Set(name, value)\n\t\t}\n"
        "\t\tfound = append(found, verify([]byte(body), headers, secret))\n\t}\n"
        "\ttold, _ := json.Marshal(found)\n\tfmt.Println(string(told))\n}\n",
    ),
}
_SUFFIX: Final = {"python": "py", "javascript": "js", "php": "php", "ruby": "rb", "go": "go"}


def snippet(language: str) -> str:
    """The one block of a language in the section."""
    section = PAGE.partition("\n## Verifying\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return str(found)


def signed(*secrets: str, body: str = BODY, age_s: float = 0) -> dict[str, str]:
    """Headers of a message, signed with each of these secrets."""
    at = datetime.fromtimestamp(time.time() - age_s, UTC)
    return {
        "webhook-id": "msg_cat_succeeded",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign("msg_cat_succeeded", at, body) for secret in secrets),
    }


@pytest.mark.parametrize("language", list(_RUN))
def test_a_snippet_tells_genuine_messages_from_others(language: str, tmp_path: Path) -> None:
    program, before, after = _RUN[language]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    good = signed(SECRET)
    cases: list[tuple[str, dict[str, str], str, bool]] = [
        (BODY, good, SECRET, True),
        (BODY, signed(OTHER, SECRET), SECRET, True),  # while secrets change
        (BODY, signed(SECRET, OTHER), SECRET, True),
        (BODY, good | {"webhook-signature": "v2,AAAA " + good["webhook-signature"]}, SECRET, True),
        (BODY, signed(SECRET, age_s=250), SECRET, True),
        (BODY, signed(OTHER), SECRET, False),
        (BODY + " ", good, SECRET, False),
        (BODY.replace("Fuchs", "Hund"), good, SECRET, False),
        (BODY, good | {"webhook-id": "msg_dog_succeeded"}, SECRET, False),
        (BODY, good | {"webhook-timestamp": str(int(good["webhook-timestamp"]) + 1)}, SECRET, False),
        (BODY, signed(SECRET, age_s=330), SECRET, False),
        (BODY, signed(SECRET, age_s=-330), SECRET, False),
        (BODY, good | {"webhook-signature": ""}, SECRET, False),
        (BODY, good | {"webhook-signature": good["webhook-signature"].removeprefix("v1,")}, SECRET, False),
        (BODY, good | {"webhook-signature": good["webhook-signature"][:-4]}, SECRET, False),
    ]
    code = tmp_path / f"verify.{_SUFFIX[language]}"
    code.write_text(before + snippet(language) + "\n" + after, encoding="utf-8")
    told = tmp_path / "cases.json"
    told.write_text(json.dumps([case[:3] for case in cases]))
    command = [program, *(["run"] if language == "go" else []), str(code), str(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [case[3] for case in cases]
