"""Turn a sentence into JSON that always parses: punctuation is pinned, fields take only what they allow.

python examples/json_form.py CHECKPOINT "json name=bob age=12"
"""

import json
import sys

from mlx_diffusiongemma import Digits, GenerationOptions, Text, fill, load

model, processor = load(sys.argv[1])
form = fill(
    model,
    processor,
    '{"name": "{{name}}", "age": {{age}}}',
    {"name": Text(3), "age": Digits(2)},
    GenerationOptions(seed=0),
    instruction=sys.argv[2],
)
print(json.dumps(json.loads(form.text), indent=2))
print(form.confidence, file=sys.stderr)
