"""Every integer of a run's step, made once and frozen: no torch, no Megatron.

May import numpy, the standard library and ``config``.

Data flow: ``roles`` (name -> what it is) -> ``parameter_info`` (facts about a parameter) ->
``partition`` (blocks of one second moment) -> ``manifest`` (the same for users and checkpoints);
``partition``, ``layout`` (buckets and their slices) -> ``segments`` (where blocks lie in a rank's
slices; ``column_runs``), ``cut_blocks`` -> ``reduction`` and ``column_sums`` (which sums cross
ranks; ``ordered_sums``) -> ``segment_table`` and
``column_table`` (what kernels walk) -> ``buffer_plan`` (slices, state and tables of one buffer) ->
``bucket_tables`` (what is summed before the step) -> ``step_plan`` (all of it for one rank) ->
``shares`` (what lies in which memory) -> ``chunks`` (what the host updates at once). Kernels keep
what they make of a table with it (``derived_tables``).

Words, here and in the whole package:

=============  =====================================================================================
parameter      a whole tensor of the model; tensor parallelism leaves each rank a shard of it
row            index of dimension 0 of the whole parameter
block          elements that share one second moment v
row segment    run of consecutive rows of one block; most blocks consist of one
buffer         Megatron's flat tensor of gradients or weights; the two mirror each other, with gaps
bucket         part of a buffer that is reduced in one collective
slice          one of the equal parts of a bucket; every data-parallel rank owns one
segment        what a slice holds of a row segment; each has one entry in the rank's vectors
element range  what a slice holds of a parameter with one second moment per element
piece          what a slice holds of a parameter
share          the state of some pieces of a buffer in one memory: the device's, or the host's
chunk          part of a share on the host that is updated at once
window         position of a run of elements in the buffer, and in the state
cut block      block with segments on several ranks; the others are uncut
spread block   block of several row segments, or with rows on several tensor-parallel ranks
edge           boundary between two slices that cuts a row segment
column set     rows of a parameter within which each column, an input, is a block
run            what a slice holds of a row segment of a column set; its columns are segments
place          position of one rank's part of a sum in a vector that ranks add up
slot           a spread block among those of its domain, and the places of its parts
values         the rank's sums, then the vectors that collectives work on; one tensor
domain         the buffers that share one pair of process groups: dense parameters, or experts
group          process group; a *parameter group* is torch's
manifest       list of all parameters with their rules and numbers of blocks
format         of a checkpoint: ``model_space`` or ``buckets``
=============  =====================================================================================

Shape suffixes, here and in the whole package:

======  ============================================================================================
``_N``  elements of a buffer
``_L``  elements of this rank's state of a buffer: its slices, one after the other
``_S``  segments of the rank (in ``segments``: of one slice; in tables: of one table)
``_R``  element ranges, likewise
``_SR`` segments, then element ranges
``_C``  runs of rows of column sets
``_E``  elements of all element ranges
``_P``  parameters
``_G``  parameter groups
``_D``  domains
``_T``  tiles, which are what one thread or program of a kernel treats
======  ============================================================================================
"""
