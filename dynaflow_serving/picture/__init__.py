"""The explanation of a plan: what it was predicted to do and what it did (`dynaflow explain` and `dynaflow check`).

`explanation` gathers what there is to say of an example or a model, and `overview` prints it. `measure` runs an example
here and `engine` a model in its engine, both for a `PlanComparison`; `figure` draws it, `page` puts it on a page.
`example_plans` verifies the plans of a config on the embedded examples.
"""
