"""Every integer of a run's step, made once and frozen: no torch, no Megatron.

May import numpy, the standard library and ``config``.

Data flow: ``roles`` (name -> what it is) -> ``parameter_info`` (facts about a parameter) ->
``partition`` (what shares one second moment) -> ``manifest`` (the same for users and checkpoints);
``partition`` -> ``layout`` (where blocks lie in a rank's slices) -> ``reduction`` (which sums cross
ranks) -> ``segment_table`` (what kernels walk) -> ``buffer_plan`` (slices, state and tables of one
buffer) -> ``step_plan`` (all of it for one rank).

Words, here and in the whole package:

=============  =====================================================================================
parameter      a whole tensor of the model; tensor parallelism leaves each rank a shard of it
row            index of dimension 0 of the whole parameter
block          elements that share one second moment v
row segment    run of consecutive rows of one block; most blocks are one
buffer         Megatron's flat tensor of gradients, and the one of weights, with gaps in them
bucket         part of a buffer that is reduced at once
slice          equal part of a bucket, the one that a data-parallel rank owns
segment        what a slice holds of a row segment; each has one entry in the rank's vectors
element range  what a slice holds of a parameter with one second moment per element
piece          what a slice holds of a parameter
window         where elements are in the buffer, and where in the state
cut block      block with segments on several ranks; the others are uncut
spread block   block with several segments per slice, or on several tensor-parallel ranks by rows
domain         the buffers that one pair of process groups shares: dense parameters, or experts
group          process group; a *parameter group* is torch's
manifest       list of all parameters with their rules and numbers of blocks
format         of a checkpoint: ``model_space`` or ``dp_reshardable``
=============  =====================================================================================

Shape suffixes, here and in the whole package:

======  ============================================================================================
``_N``  elements of a buffer
``_L``  elements of this rank's state of a buffer: its slices, one after the other
``_S``  segments of the rank (in ``layout`` and in tables: of one slice, one table)
``_R``  element ranges, likewise
``_SR`` segments, then element ranges
``_E``  elements of all element ranges
``_P``  parameters
``_G``  parameter groups
``_D``  domains
``_T``  pieces of work of a kernel
======  ============================================================================================
"""
