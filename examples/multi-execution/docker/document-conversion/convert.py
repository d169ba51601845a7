"""Converts a document with LibreOffice.

    convert.py convert < job.json

  in   text or document_base64   the document
       from                      its form: txt, md (taken as text), html, docx, odt
       to                        the form wanted: html, pdf, docx, odt
  out  document_base64, bytes, from, to
"""
import base64
import json
import pathlib
import subprocess
import sys
import tempfile

FROM = {"txt": "txt", "md": "txt", "html": "html", "docx": "docx", "odt": "odt"}
TO = ("html", "pdf", "docx", "odt")


def convert(job):
    source_form, target_form = job["from"], job["to"]
    if source_form not in FROM:
        sys.exit(f"from must be one of {', '.join(FROM)}")
    if target_form not in TO:
        sys.exit(f"to must be one of {', '.join(TO)}")
    if job.get("text"):
        document = job["text"].encode()
    else:
        document = base64.b64decode(job["document_base64"], validate=True)
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, f"document.{FROM[source_form]}")
        source.write_bytes(document)
        out = pathlib.Path(folder, "out")
        command = ["soffice", f"-env:UserInstallation=file://{folder}/profile", "--headless", "--norestore"]
        if FROM[source_form] == "txt":
            command.append("--infilter=Text (encoded):UTF8")
        command += ["--convert-to", target_form, "--outdir", str(out), str(source)]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        target = out / f"document.{target_form}"
        if done.returncode or not target.is_file():
            sys.exit(f"LibreOffice ended with {done.returncode} and wrote no {target_form}")
        result = target.read_bytes()
    return {"document_base64": base64.b64encode(result).decode(), "bytes": len(result), "from": source_form, "to": target_form}


if __name__ == "__main__":
    if sys.argv[1:] != ["convert"]:
        sys.exit("usage: convert.py convert < job.json")
    json.dump(convert(json.load(sys.stdin)), sys.stdout)
