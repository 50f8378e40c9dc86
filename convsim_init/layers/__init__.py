"""From a module or a state dict to the filter banks of its convolutions, and back.

`find` lists the layers, each a `layer.Layer`: the convolutions among the modules of a model, those that a graph calls
(`graphs`), or what the entries of a state dict are taken for (`inferred`). `owners` tells which weight each uses: a
`stored` one, or another that a trial pass of a module with its own values shows (`forward`). Whether that is needed,
and which channels are compared, is told by forward passes of the model on unknown values (`symbolic`). An `obstacle`
is why a layer is left alone; `remarks` are what a report says beside the layers. `tree`, `names` and `memory` know what
modules hold, what they are called without wrappers, and which tensors lie in one memory.
"""
