"""The buckets of the rehearsal, made once. Endpoint and credentials are where boto3 finds them."""

import boto3

BUCKETS = ("reviews", "pictures", "nightshift")


def make() -> None:
    """Create what is missing."""
    client = boto3.client("s3")
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in there:
            client.create_bucket(Bucket=bucket)


if __name__ == "__main__":
    make()
