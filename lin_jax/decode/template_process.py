"""A program: write a conversation by a chat template. The template is anybody's code, so it has limits of its own.

Called with a tokenizer's directory. Standard input: JSON with "messages", and the limits "seconds" (of the processor),
"bytes" (of memory) and "tokens". Standard output: JSON with "ids" or "error"; with neither, a limit ended the process.
"""

import json
import resource
import sys


def main() -> None:
    """Read a request, apply the template, and print what came out."""
    # Before the request is there, which this process is started ahead of: it takes seconds.
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
    given = json.load(sys.stdin)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + given["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (given["bytes"], given["bytes"]))
    try:
        ids = tokenizer.apply_chat_template(given["messages"], add_generation_prompt=True, return_dict=False)
        answer = {"ids": ids} if len(ids) <= given["tokens"] else {"error": f"it gives {len(ids)} tokens"}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:  # a template may raise anything
        answer = {"error": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
