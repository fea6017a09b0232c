"""A sample of reviews, to where the rehearsal's job looks for uploads. Endpoint and credentials are where boto3 finds them."""

import sys

import boto3
from sample import reviews

BUCKET, ROWS = "reviews", 3000


def upload(seed: int) -> str:
    """Put the sample of a seed into the inbox; its URI."""
    key = f"inbox/sample-{seed}.jsonl"
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b"".join(line + b"\n" for line in reviews(ROWS, seed)))
    return f"s3://{BUCKET}/{key}"


if __name__ == "__main__":
    uri = upload(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(f"{uri}: the DAG `uploads` sees it, and starts a run of review_sentiment.")
    print("The same upload again starts none; another number behind the command makes another sample.")
