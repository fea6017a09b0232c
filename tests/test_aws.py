"""boto3's session: one for all, and not older than what it was made from."""

from __future__ import annotations

import os

from nightshift.aws import default_session


def test_the_session_is_one_until_the_credentials_change(tmp_path, monkeypatch):
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = s\n")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    session = default_session()
    assert default_session() is session
    assert session.get_credentials().access_key == "old"
    file.write_text("[default]\naws_access_key_id = new\naws_secret_access_key = s\n")
    os.utime(file, ns=(1, 1))
    assert default_session().get_credentials().access_key == "new"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    assert default_session().region_name == "eu-central-1"
