"""From a module or a state dict to the filter banks of its convolutions, and back.

`find` lists the layers, each a `layer.Layer`: the convolutions among the modules of a model, those that a graph calls
(`graphs`), or those inferred from the entries of a state dict (`inferred`). `owners` finds the weight that each uses: a
`stored` one, or another one that a trial pass of a module shows (`forward`). Symbolic forward passes of the model, on
unknown values, show whether trial passes are needed and which channels to compare (`symbolic`). An `obstacle` is the
reason why a layer is left alone; `remarks` are what a report says besides the layers. `tree`, `names` and `memory` tell
what modules hold, their names without those of wrappers, and which tensors share memory.
"""
