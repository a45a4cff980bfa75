"""Every guard of a living model deleted once: each must turn a seed or a test red.

    python -m tests.guards                         all of them, two at a time
    python -m tests.guards averages adopt          those whose line has all of these words

GUARDS has a line for each, under its file: a function ("_": any) and a text. The smallest statement
of the function that contains the text is deleted in a copy of the project, or the text is replaced
by what follows "=>". Every other statement of ROOMS that raises or warns is a guard too.

The checks that must turn red come after "@": seeds of `tests.host_programs` and tests (`into`,
`into::test_start`). Without "@" they are the tests that quote the text of the guard's message. The
first that is red counts. It must be green with the guard.

How to read a failure: a guard that stays GREEN has no test, or is dead code. One that is GONE was
moved or written otherwise; then its line here moves too. DOUBTFUL is a red of the deletion itself
(a name that is missing then, a hang) or one that comes and goes.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.fsdp  # noqa: F401

__all__ = ["GUARDS", "Guard", "guards"]

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ["-q", "-n", "0", "-p", "no:cacheprovider", "--timeout", "300", "-rN", "--tb", "short"]
LOG = os.O_WRONLY | os.O_CREAT | os.O_APPEND
BAD = ("GREEN", "GONE", "DOUBTFUL")
DOUBTFUL = re.compile(r"(Name|UnboundLocal|Syntax|Indentation|Import)Error|Timeout|it hung|^in ")
QUOTED = 8  # tests that quote a message, the closest first
ROOMS = ("dist_ema/averaging", "dist_ema/sharding", "dist_ema/verbs")

GUARDS = """
averaging/averages.py
    adopt             self.inventory.rebind_moved()  @175
    adopt             refuse_shared(  @living_storages::test_two_weights_in_one_memory_are_named
    adopt             self.swaps.watch  @177
    adopt             self.mark()  @living_details::test_training_that_no_update_follows_is_named
    _replan           self.teacher.bind_copies(self.states) => []
            @compat_modules::test_frozen_weights_follow_under_any_function
    refuse            {why}  @discovery::test_summon_full_params_is_refused
    ready             self.reshard()  @living_details::test_fsdp2_in_one_process
    ready             self.settle()  @emulated/test_waits::test_behind_the_step_equals_inline
    ready             self.follow  @106
    ready             self.teacher.forget_copies()
            @into::test_frozen_weights_that_no_counter_saw_follow_at_the_next_verb
    ready             self.teacher.copy_frozen()  @into::test_frozen_weights_follow
    ready             self.copy_live()  @optimizer_hooks::test_start_seeds_the_shadow
    settle            end_read()  @metrics::test_times_of_a_side_stream
    settle            self._await_teacher_reads()  @emulated/test_waits
    follow            self.adopt  @living_tree::test_only_decides_whether_a_new_weight_is_one
    follow            self.inventory.rebind_moved()  @106
    follow            refuse_shared
            @living_storages::test_live_in_the_memory_of_the_average_is_named
    follow            self._replan()  @175
    before_step       self.refuse  @swap::test_order_of_calls
    await_reads       refuse_written  @engines::test_weights_written_behind_the_step_are_named
    before_step       is_stale |=  @into::test_live_until_start
    begin             self.follow  @reliability::test_weights_that_move_before_averaging_starts
    move              if number < 2 or self._watch.changed(): => if False:
            @living_tree::test_a_complex_weight_that_is_unfrozen_is_noticed_too
    move              refuse_unfrozen
            @living_details::test_a_layer_under_fsdp2_that_was_unfrozen_is_named_by_the_update
    move              self.follow  @175
    move              self._watch.begin_read()
            @engines::test_weights_written_behind_the_step_are_named
    note_swap         self.mark()
            @living_details::test_training_that_no_update_follows_is_named
    set_clock         self.mark()  @living_details::test_writes_that_are_no_training
    resume            self.forget_mark()  @living_details::test_writes_that_are_no_training
    copy_live         self.teacher.forget_copies()
            @living_details::test_a_late_start_copies_what_was_frozen_and_written_before
    after_move        copy_frozen  @compat_modules::test_frozen_weights_follow_under_any_function
    after_move        copy_buffers  @into::test_registered_anew
averaging/inventory.py
    roots             , *teachers] => ]
            @into::test_an_update_names_the_assigned_weights_of_a_teacher
    roots             [] if self.sharded else =>  @living_ranks::test_living_models_on_two_ranks
    walk_tree         no longer shares memory  @175
    walk_tree         changes.replaced_buffers) => ())
            @living_buffers::test_an_averaged_buffer_that_is_no_longer_shared_is_named
    _refuse_replaced_teacher  of the teacher is another object
            @into::test_a_teacher_whose_weights_are_replaced_is_named
    walk_tree         is gone from the model
            @living_tree::test_an_averaged_buffer_that_is_gone_is_named
    walk_tree         changes.gone if name in averaged | copied => changes.gone if name in averaged
            @into::test_frozen_weights_that_are_replaced_follow
    walk_tree         for name in changes.gone_buffers => for name in ()
            @living_tree::test_an_averaged_buffer_that_is_gone_is_named
    walk_tree         is tied otherwise  @living_texts::test_a_tie_is_called_a_tie
    walk_tree         is new and trainable
            @living_storages::test_the_next_update_sees_an_edit_of_the_tree
    walk_tree         adopted + changes.gone + changes.gone_buffers => ()
            @living_tree::test_what_is_not_trained_is_adopted
    walk_tree         changes.replaced + changes.replaced_buffers => changes.replaced_buffers
            @living_tree::test_weights_that_are_registered_anew_and_not_averaged_are_live
    walk_tree         averaged | trained => trained
            @living_tree::test_a_frozen_object_under_the_name_of_a_trained_weight_is_named
    walk_tree         self.refuse_unfrozen()
            @living_details::test_a_weight_that_was_unfrozen_is_named_by_every_verb
    rebind_moved      or state.layout_changed =>  @living_storages::test_a_conjugated_view_is_named
    rebind_moved      self._teacher.follow
            @living_storages::test_a_teacher_whose_memory_is_no_longer_its_own
    rebind_moved      forget_reshaped_buffers
            @living_buffers::test_own_buffers_end_when_training_resizes_one_of_them
    refuse_unfrozen   became trainable
            @living_tree::test_a_complex_weight_that_is_unfrozen_is_noticed_too
    adopt             self._refuse_hopeless
            @discovery::test_what_cannot_be_averaged_is_refused_by_name
    adopt             forget_buffers
            @living_buffers::test_rescan_leaves_own_buffers_to_the_module_that_had_them
    _refuse_hopeless  is not dense  @discovery::test_what_cannot_be_averaged_is_refused_by_name
    _refuse_hopeless  float8 cannot  @discovery::test_frozen_integer_bool_and_float8_pass_through
    _held_alike       and old.shape == new.shape and not lies_alike => and False
            @living_storages::test_rescan_loses_no_average_of_a_weight_that_turned
    _held_alike       and not any(are_buffers) =>
            @living_tree::test_a_weight_that_becomes_a_buffer_is_live
    _held_alike       all(are_buffers) or =>
            @living_buffers::test_an_averaged_buffer_that_is_no_longer_shared_is_named
    _kept             in shard.names => in (shard.name,)
            @living_details::test_a_tie_under_an_earlier_name_keeps_its_average
averaging/storage_watch.py
    refuse_written    raise RuntimeError
            @engines::test_weights_written_behind_the_step_are_named
    renew             , *_counted_apart(param.shard)) => ,)  @living_ranks
    changed           True in [tensor.requires_grad for tensor in self._frozen] or =>
            @living_tree::test_a_complex_weight_that_is_unfrozen_is_noticed_too
    trained_unseen    and now[1] == before[1] =>  @metrics::test_times_of_a_side_stream
    trained_unseen    now[0] != before[0] => False  @optimizer_hooks::test_one_update_per_step
averaging/storage_watch.py
    refuse_shared     in the memory of the average
            @living_storages::test_live_in_the_memory_of_the_average_is_named
    refuse_shared     and their  @living_storages::test_a_teacher_whose_memory_is_no_longer_its_own
    agrees            return self.state.live.data_ptr()
            @living_storages::test_a_teacher_whose_memory_is_no_longer_its_own
sharding/memory_watch.py
    changed           self._table.differs() => False  @memory_watch
    changed           self._tree.changed() or =>  @memory_watch
    changed           or _address_hash(self._weights()) != self._addresses =>  @memory_watch
    changed           return self._state() != self._read => return False
            @living_storages::test_a_weight_that_is_transposed_in_place_is_named
    _weights          , map(_LOCAL_TENSOR, self._dtensors)) => )
            @living_details::test_a_local_tensor_that_fsdp2_replaces_is_followed
    _state            self._orders.now(read) => ()
            @living_storages::test_a_weight_that_is_transposed_in_place_is_named
    _state            return _address_hash(read), => return None,
            @living_details::test_an_averaged_buffer_that_is_assigned_is_followed
    __init__          readers[id(shard.master())]
            @living_details::test_masters_that_lie_elsewhere_are_noticed
    changed           self.sizes() != self._sizes or =>  @memory_watch
    changed           or not all( => and not all(  @memory_watch
    differs           not all(map(operator.is_, locals_, self._locals)) or =>  @memory_watch
    differs           or self._differs() =>  @memory_watch
    __init__          many and plain_types and => many and  @memory_watch
    _address_hash     except (TypeError, RuntimeError) => except ZeroDivisionError
            @living_storages::test_the_next_update_sees_an_edit_of_the_tree
    now               [row_major, => [
            @living_storages::test_a_weight_that_is_transposed_in_place_is_named
    now               chain(self._permuted, read) => read
            @living_storages::test_a_weight_that_is_transposed_in_place_is_named
    now               chain(self._permuted, read) => self._permuted
            @living_storages::test_an_averaged_buffer_that_is_transposed_in_place_is_named
    now               , *map(Tensor.is_conj, self._complex) =>
            @living_storages::test_a_conjugated_view_is_named
sharding/ownership.py
    rebind            redescribe(self.shard)
            @living_buffers::test_own_buffers_end_when_training_resizes_one_of_them
    rebind            refuse_taken_over  @refusals::test_a_weight_that_deepspeed_took_over
    rebind            has no memory now
            @living_storages::test_a_storage_that_was_freed_is_named_and_followed_when_it_is_back
    rebind            changed |=  @living_storages::test_a_model_that_was_cast_for_good_is_named
    rebind            changed = self.layout_changed => changed = False
            @living_texts::test_a_resized_embedding_is_called_resized
    moved             not self.shard.dense or =>
            @living_details::test_a_strided_weight_is_read_anew_wherever_its_copy_lies
    assign            is sparse, quantized
            @living_subclasses::test_other_trained_subclasses_are_refused_by_name
sharding/discovery.py
    find_shards       _refuse_empty  @living_texts::test_weights_without_elements_are_refused
    _plain            _refuse_unfilled  @discovery::test_what_cannot_be_averaged_is_refused_by_name
sharding/tree_changes.py
    _compare_weights  changes["gone" if  @living_tree::test_an_adapter_merged_and_unloaded
    _compare_weights  changes["retied"].append(name)  @living_tree::test_every_verb_sees_the_edit
    _compare_weights  changes["replaced"].append
            @living_swap::test_a_weight_that_leaves_the_model_inside_is_named
    _compare_weights  changes["new_trainable"
            @living_storages::test_the_next_update_sees_an_edit_of_the_tree
    _compare_buffers  changes["new_buffers"]
            @living_buffers::test_files_hold_a_buffer_that_was_filled_since
    _compare_buffers  changes["replaced_buffers"]
            @living_buffers::test_an_averaged_buffer_that_is_no_longer_shared_is_named
    _compare_buffers  is_persistent != shard.persistent or =>
            @living_details::test_a_buffer_that_no_longer_persists_is_in_no_file
    _compare_buffers  changes["gone_buffers"]
            @living_tree::test_an_averaged_buffer_that_is_gone_is_named
sharding/derived.py
    caches_dropped    module.train(True)  @living_caches::test_a_copy_in_eval_mode_is_never_stale
    caches_dropped    parametrize._cache.clear()
            @living_caches::test_a_cache_opened_inside_the_block
    caches_dropped    module.train(mode)  @living_caches::test_caches_are_dropped_at_both_ends
    caches_dropped    module.training = mode  @living_caches::test_every_mode_is_restored
    is_power_iteration_vector  return name in ("_u", "_v") => return False
            @living_buffers::test_vectors_of_a_spectral_norm_are_not_averaged
    is_power_iteration_vector  return any( => return False and any(
            @living_buffers::test_vectors_of_a_spectral_norm_are_not_averaged
    refreshed_vectors  register_forward_pre_hook(_iterate)
            @living_buffers::test_recalibrate_refreshes_the_vectors_for_the_average
    refreshed_vectors  partial(_iterate_old, norm)
            @living_buffers::test_recalibrate_refreshes_the_vectors_for_the_average
    refreshed_vectors  vector.copy_(value)
            @living_buffers::test_vectors_are_restored_when_recalibrate_raises
sharding/fsdp2.py
    reshard_module    post_optim_event = None  @emulated/test_groups
distributed/ranks.py
    transfer_device   "cpu" in dict(pair.split(":") for pair in pairs) => "cpu" in str(pairs)
            @emulated/test_groups
    transfer_device   bound or torch.device => torch.device  @emulated/test_groups
checkpoint/load_into.py
    load_into         await_host_reads
            @emulated/test_waits::test_a_saved_model_goes_into_host_memory
averaging/drop_in_rules.py
    pull              await_host_reads  @emulated/test_waits::test_a_pull_writes_into_host_memory
    move_by           weights.refuse
            @living_storages::test_the_rule_of_a_drop_in_reads_what_live_is
    move_by           weights.settle  @engines::test_a_rule_waits_for_the_update_in_flight
    move_by           weights.follow
            @living_storages::test_the_rule_of_a_drop_in_reads_what_live_is
    pull              weights.mark()  @living_details::test_writes_that_are_no_training
    pull              weights.ready()  @living_storages::test_pull_writes_what_live_is
averaging/swap.py
    enter             clear_autocast_cache  @living_caches::test_autocast_caches_see_the_swap
    leave             clear_autocast_cache  @living_caches::test_autocast_caches_see_the_swap
    leave             when_outermost(self._restore_alone) => when_outermost  @177
    _enter            with derived.caches_dropped(self._weights.model): => if True:
            @living_caches::test_parametrize_cached_sees_the_swap
    _exchange_and_restore  with derived.caches_dropped(self._weights.model): => if True:
            @living_caches::test_a_cache_opened_inside_the_block
    _leave            refuse_covered()  @177
    _leave            self._weights.reshard()  @living_details::test_fsdp2_in_one_process
    _leave            self._average.own_buffers |=
            @living_buffers::test_a_buffer_that_the_block_left_alone_is_kept_with_its_module
    _leave            self.remarks = swap_writes.describe
            @living_swap::test_a_write_is_named_and_live_is_restored
    _leave            error.add_note
            @living_details::test_an_exception_in_the_block_carries_what_was_written
    _edits            lost = [ => lost = [] and [
            @living_swap::test_a_weight_that_leaves_the_model_inside_is_named
    _edits            return lost, [ => return lost, [] and [
            @living_swap::test_a_weight_that_the_block_registers_is_named
    apply             _refuse_destroyed_groups  @living_ranks
    _restore_alone    discount
            @living_details::test_swaps_of_two_averages_in_each_other_write_nothing
    _restore_alone    note_swap(False)
            @living_buffers::test_own_buffers_end_when_training_resizes_one_of_them
    __del__           self._restore_alone()
            @living_details::test_a_swap_that_is_dropped_restores_live_weights
averaging/swap_registry.py
    refuse            inside ema.swap()  @swap::test_order_of_calls
    refuse            inside the swap of another
            @living_guards::test_a_second_average_inside_the_swap_of_the_first
    refuse            reads & Reads.LIVE and => False and
            @living_guards::test_a_second_average_inside_the_swap_of_the_first
    refuse            reads & Reads.WHOLE_MODEL and => False and
            @living_guards::test_copies_to_and_fro_inside_anothers_swap_are_refused
    refuse            ema.swap() that failed
            @swap_faults::test_failed_broadcasts_and_writes_on_ranks
    when_outermost    inner._waiting.append
            @living_swap::test_swaps_that_are_left_in_another_order_are_named_and_restore_live
    refuse_covered    raise RuntimeError
            @living_swap::test_swaps_that_are_left_in_another_order_are_named_and_restore_live
    watch             for one, two in  @177
    note              other.writes += 1  @living_details::test_writes_that_are_no_training
averaging/swap_writes.py
    __init__          swaps.nested.clear()
            @living_details::test_swaps_of_two_averages_in_each_other_write_nothing
    names             or (state.layout_changed and state.shadow is not None) =>
            @living_storages::test_a_weight_transposed_inside_a_swap_is_named_at_the_exit
    names             state.rebind()  @living_swap::test_a_write_is_named_and_live_is_restored
    names             old._version != expected[0] or =>
            @living_details::test_a_write_into_a_frozen_weight_is_named
    names             or not _same_bits(old, state.local) =>
            @living_details::test_a_write_into_a_frozen_weight_is_named
    names             versions(state) != expected) => False)
            @living_details::test_a_write_into_a_frozen_weight_is_named
    names             if is_counted or old != new => if is_counted
            @living_swap::test_a_write_is_named_and_live_is_restored
    changed_buffers   is no buffer of the model
            @living_details::test_a_buffer_that_the_block_removes_is_named
    changed_buffers   reshaped.add
            @living_buffers::test_a_module_whose_bank_grew_inside_keeps_no_state
    changed_buffers   in changed - reshaped => in changed
            @living_buffers::test_a_module_whose_bank_grew_inside_keeps_no_state
averaging/teacher.py
    give              requires_grad_(False)  @into::test_teacher_is_the_shadow
    give              self._refuse_taken()  @into::test_a_teacher_of_two_averages_is_refused
    give              self._refuse_unlike  @into::test_unlike_teachers_are_refused
    follow            of the teacher was  @into::test_teacher_that_changes_is_named
    follow            state.teacher_copy = new  @into::test_registered_anew
    follow            state.shadow = new
            @living_storages::test_a_teacher_whose_memory_is_no_longer_its_own
    bind_copies       self.written + =>
            @living_storages::test_a_teacher_whose_memory_is_no_longer_its_own
    refuse_training   the optimizer trains  @into::test_teacher_is_not_trained
    copy_frozen       _copy(state)  @into::test_frozen_weights_follow
    copy_frozen       versions(state) => (state.local._version, 0)  @living_ranks
    reshard           derived.caches_dropped(self.module) => torch.no_grad()
            @living_caches::test_a_copy_in_eval_mode_is_never_stale
averaging/teacher_hooks.py
    put_on            register_load_state_dict_pre_hook => register_forward_pre_hook
            @into::test_load_state_dict_waits
    take_off_spent    handle.remove()  @into::test_copies_of_the_teacher_are_free
averaging/optimizer_hooks.py
    _before           move_to_end
            @living_optimizers::test_the_update_comes_after_hooks_of_all_optimizers
    _before_any       self._weights.await_reads
            @emulated/test_waits::test_optimizers_that_step_before_the_attached_one
    _round            self._weights.bypassed = 0
            @transformers::test_optimizers_that_step_each_layer_in_the_backward
    _stepped          did not step in the last
            @living_optimizers::test_experts_without_tokens_are_named_once
    _stepped          self._weights.bypassed +=
            @living_optimizers::test_another_optimizer_that_steps_instead_is_named
    _stepped          never since
            @living_optimizers::test_an_optimizer_that_never_steps_is_named_once
    _warn_of_wrapped_step  warnings.warn
            @living_optimizers::test_a_step_that_was_replaced_on_the_optimizer_is_named_once
    _that_takes_hooks  raise ValueError
            @living_optimizers::test_a_zero_optimizer_is_refused_or_right
    _run              is gone, so nothing  @optimizer_hooks::test_an_ema_that_is_dropped_is_freed
    _forget_dead_hooks  del hooks[key]
            @optimizer_hooks::test_an_ema_that_is_dropped_is_freed
            @optimizer_hooks::test_an_ema_that_is_collected_within_a_step
    _run              _forget_dead_hooks(getattr
            @optimizer_hooks::test_an_ema_that_is_dropped_is_freed
            @optimizer_hooks::test_an_ema_that_is_collected_within_a_step
verbs/likely_mistakes.py
    warn_if_idle      warn(  @optimizer_hooks::test_one_update_per_step
    warn_if_doubled   warn(
            @optimizer_hooks::test_updates_by_hand_after_each_attached_one_are_named_once
    warn_of_unexplained_keys  warn(  @living_tree::test_keys_that_nothing_explains_are_named
averaging/average.py
    heard             , device="cpu", pin_memory => , pin_memory
            @emulated/test_waits::test_skipped_steps_are_heard_whole
    refuse_dtype      raise ValueError  @to::test_refused
    __post_init__     raise ValueError  @refusals::test_names_are_chosen_by_text_or_a_function
averaging/engines.py
    _refuse_failed    raise RuntimeError  @engines::test_a_worker_that_fails_reaches_the_trainer
averaging/executors.py
    run_shielded      raise error  @refusals::test_an_error_in_a_thread_is_raised
    wait              raise RuntimeError  @refusals::test_a_thread_that_is_gone_is_named
averaging/gather.py
    _refuse_other     raise ValueError  @refusals::test_models_that_differ_take_no_copy
averaging/inventory.py
    _refuse           raise RuntimeError  @living_texts::test_a_tie_is_called_a_tie
    adopt             is held by ranks  @refusals::test_a_model_that_is_sharded_after_its_average
    adopt             raise ValueError(self.lacks
            @living_buffers::test_a_choice_that_matches_nothing_is_an_error
    average           raise ValueError  @several::test_which_names_an_average
averaging/kernels/cpu_threads.py
    run_on_threads    os.getpid() != PROCESS => False  @cpu_numba::test_forked
averaging/kernels/gpu_plan.py
    is_proved         is not used on  @gpu_triton::test_a_wrong_kernel_is_not_used
averaging/stepped_weights.py
    refuse_beside_masters  has fp32 masters  @refusals::test_masters_are_stepped_by_the_engine
    refuse_beside_masters  is kept in 16 bits  @refusals::test_16_bits_without_masters
averaging/swap.py
    _leave            raise raised  @living_details::test_a_buffer_that_the_block_removes_is_named
averaging/teacher.py
    refuse_beside_teacher  together with into  @into::test_options_that_the_teacher_decides
    give              raise ValueError  @rl::test_a_reference_that_does_not_fit_is_refused
    _refuse_taken     raise ValueError  @into::test_a_teacher_of_two_averages_is_refused
    refuse_untied     raise ValueError  @into::test_unlike_teachers_are_refused
    _refuse_unlike    in the model and {memory.shape}  @into::test_unlike_teachers_are_refused
    _refuse_unlike    this rank holds  @into::test_unlike_teachers_are_refused
    _refuse_unlike    which cannot hold its  @into::test_unlike_teachers_are_refused
    _refuse_unlike    has fp32 masters  @refusals::test_masters_are_stepped_by_the_engine
    _refuse_unlike    is strided or expanded  @into::test_unlike_teachers_are_refused
    _refuse_unlike    is one weight in the model  @into::test_unlike_teachers_are_refused
averaging/updates.py
    refuse_capture    raise RuntimeError  @emulated/test_waits::test_capture_is_refused
averaging/window_ring.py
    _new              raise OSError  @window::test_a_full_disk_under_the_ring_is_an_error
sharding/memory_watch_numba.py
    compile_loop      raise ImportError  @memory_watch::test_the_loop_is_switched_off
sharding/consistency.py
    on_weights        raise ValueError  @discovery::test_ddp_ignored_and_unequal_replicas
    on_averages       raise RuntimeError  @writer::test_on_ranks
sharding/discovery.py
    _describe         two stages of this rank  @pipelines::test_two_stages
    _refuse_unfilled  raise ValueError  @into::test_unlike_teachers_are_refused
    _members          raise ValueError
            @refusals::test_weights_on_ranks_that_do_not_contain_each_other
sharding/fsdp2.py
    dtensor_shard     a Partial weight  @refusals::test_dtensors_that_cannot_be_averaged
    dtensor_shard     should leave  @refusals::test_dtensors_that_cannot_be_averaged
    dtensor_shard     the local tensor has  @refusals::test_dtensors_that_cannot_be_averaged
sharding/fsdp1.py
    record            is a DTensor inside  @refusals::test_fsdp1_over_dtensors
    record            is on the meta device  @refusals::test_fsdp1_on_the_meta_device
sharding/ownership.py
    assign            has fp32 masters  @refusals::test_masters_are_stepped_by_the_engine
    rebind            with {old.numel()} elements  @living_storages::test_a_conjugated_view_is_named
sharding/parameters.py
    __init__          got {type(given)  @parameters::test_what_is_no_list_is_refused
    __init__          got {type(item)  @parameters::test_what_is_no_list_is_refused
    __init__          belongs to FSDP1  @refusals::test_parameters_of_fsdp1
sharding/zero.py
    take_masters      is cut by DeepSpeed  @refusals::test_a_layout_that_is_not_known
    refuse_taken_over  raise RuntimeError  @refusals::test_a_weight_that_deepspeed_took_over
verbs/entry.py
    adopt             raise ValueError  @refusals::test_stages_that_hold_nothing_to_average
    refuse_staged     raise RuntimeError  @refusals::test_stages_have_no_whole_model
    begin             warn(  @living_ranks::test_living_models_on_two_ranks
verbs/likely_mistakes.py
    warn_if_nameless  warn(  @parameters::test_verbs_take_lists
verbs/loading.py
    load              warn(*checkpoint
            @refusals::test_averages_of_what_is_frozen_now_are_passed_over
verbs/saving.py
    submit            warn(*writer  @local_verbs
    _write_together   warn(*self.writer  @writer::test_a_save_is_a_model
    finish            warn(*self.writer  @publish::test_a_version_in_flight_is_not_waited_for
verbs/publisher.py
    __init__          raise ValueError  @publish::test_options_that_are_refused
    begin             raise RuntimeError  @publish::test_a_version_in_flight_is_not_waited_for
    _publish          warn(  @publish::test_a_full_disk_is_a_warning
checkpoint/read_plan.py
    _                 state.is_copied_buffer and not own => False
            @living_buffers::test_a_resume_into_a_fresh_model_passes_over_copied_buffers
    compare           if not state.is_copied_buffer: => if True:
            @living_buffers::test_a_module_that_is_another_one_takes_no_own_buffers
    _                 passed_over += sorted
            @living_buffers::test_a_module_that_is_another_one_takes_no_own_buffers
"""


@dataclass(frozen=True)
class Guard:
    """A statement that must not be deleted, or a text that must not be replaced."""

    file: Path
    function: str
    text: str
    instead: str | None
    checks: tuple[str, ...]  # seeds and tests

    @classmethod
    def of(cls, file: str, line: str) -> Guard:
        """Of a line of GUARDS."""
        rule, *tests = line.strip().split("  @")
        function, rest = rule.split(maxsplit=1)
        text, arrow, instead = rest.partition(" =>")
        checks = tuple(_check(name) for each in tests for name in each.split(","))
        return cls(
            Path("dist_ema", file), function, text, instead.strip() if arrow else None, checks
        )

    def __str__(self) -> str:
        replaced = "" if self.instead is None else f" => {self.instead}"
        return f"{self.file} {self.function}: {' '.join(self.text.split())[:90]}{replaced}"

    def find(self, source: str, tree: ast.Module) -> ast.stmt | None:
        """The smallest statement of the function that has the text."""
        found = [
            node
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and self.function in (function.name, "_")
            for node in ast.walk(function)
            if isinstance(node, ast.stmt) and self.text in _segment(source, node)
        ]
        return min(found, key=lambda node: len(_segment(source, node)), default=None)

    def delete(self, source: str) -> str | None:
        """The source without the guard; None if it is not there.

        Raises:
            SyntaxError: Nothing that runs is left.
        """
        node = self.find(source, ast.parse(source))
        if node is None:
            return None
        lines = source.splitlines(keepends=True)
        before = "".join(lines[node.lineno - 1 : node.end_lineno])
        after = " " * node.col_offset + "pass" + "\n" * before.count("\n")
        if self.instead is not None:
            after = before.replace(self.text, self.instead, 1)
        without = "".join([*lines[: node.lineno - 1], after, *lines[node.end_lineno :]])
        compile(without, str(self.file), "exec")
        return without


def _segment(source: str, node: ast.stmt) -> str:
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


@cache
def guards() -> list[Guard]:
    """Those of GUARDS, in that order, and every other refusal and warning of the same rooms."""
    found, file = [], ""
    for line in re.sub(r"\n +@", "  @", GUARDS.strip()).splitlines():
        if line.startswith(" "):
            found.append(Guard.of(file, line))
        else:
            file = line
    return found + [
        guard
        for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
        for guard in _refusals(path, found)
    ]


def _refusals(path: Path, listed: Sequence[Guard]) -> Iterator[Guard]:
    """Every statement of a file that raises or warns, but for those of `listed`."""
    file, source = path.relative_to(ROOT), path.read_text()
    tree = ast.parse(source)
    own = [guard.find(source, tree) for guard in listed if guard.file == file]
    seen = {id(inner) for node in own if node is not None for inner in ast.walk(node)}
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for node in ast.walk(function):
            if id(node) not in seen and isinstance(node, ast.stmt) and _refuses(node):
                seen.add(id(node))
                yield Guard(file, function.name, _segment(source, node), None, ())


def _refuses(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return node.exc is not None
    call = node.value if isinstance(node, ast.Expr) else None
    name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
    return re.search(r"(warn|\b_refuse)$", name) is not None


# --- which checks belong to which guards ----------------------------------------------------------


def _check(name: str) -> str:
    """What runs it: a seed, a test, or a file or folder of tests."""
    if name.isdecimal():
        return f"seed {name}"
    return f"tests/{name}" if (ROOT / "tests" / name).is_dir() else _test(*name.split("::"))


def _test(file: str, *names: str) -> str:
    return "::".join([f"tests/{file}.py" if "/" in file else f"tests/test_{file}.py", *names])


def _phrases(node: ast.AST) -> set[str]:
    """Every three words that follow each other in one of its texts."""
    found = set()
    for text in ast.walk(node):
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            words = re.findall(r"[a-z_]+", text.value.lower())
            found |= {" ".join(words[place : place + 3]) for place in range(len(words) - 2)}
    return found


@cache
def _quotes() -> list[tuple[str, set[str]]]:
    """The phrases of every test, and of what it uses of its file."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        nodes = {name: node for node in ast.parse(path.read_text()).body for name in _names(node)}
        for name in [name for name in nodes if name.startswith("test_")]:
            used, reached = [name], {name}
            for each in used:
                inner = {node.id for node in ast.walk(nodes[each]) if isinstance(node, ast.Name)}
                used += sorted((inner & nodes.keys()) - reached)
                reached |= inner
            phrases = set().union(*(_phrases(nodes[each]) for each in used))
            found.append((f"{path.relative_to(ROOT)}::{name}", phrases))
    return found


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _checks(guard: Guard, source: str) -> Sequence[str]:
    """In the order in which they run."""
    node = guard.find(source, ast.parse(source))
    if guard.checks or node is None:
        return guard.checks
    phrases = _phrases(node)
    shared = {name: len(phrases & quoted) for name, quoted in _quotes()}
    least = max(1, max(shared.values()) // 2)
    names = [name for name in shared if shared[name] >= least]
    return sorted(names, key=shared.__getitem__, reverse=True)[:QUOTED]


# --- a guard is missing ---------------------------------------------------------------------------


class _Judge:
    """A pytest plugin that stops at the first test that is red as its guard is missing."""

    def __init__(self, stops: bool = True) -> None:
        self.red, self.doubtful, self.green, self._stops = "", "", list[str](), stops

    def take(self, name: str, failure: str) -> None:
        if DOUBTFUL.search(failure):
            self.doubtful = self.doubtful or f"{name} - {failure}"
        elif failure:
            self.red = self.red or f"{name} - {failure}"

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.take(report.nodeid, "in collection")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when == "call":
            self.green.append(report.nodeid)
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = crash.message.strip().splitlines() if crash else [report.longreprtext]
        failure = lines[-1] if "on rank" in lines[0] else lines[0]
        self.take(report.nodeid, failure if report.when == "call" else f"in {report.when}")
        self._session.shouldstop = self._stops and bool(self.red)


def _judge(names: Sequence[str]) -> list[str]:
    """The first of the checks that is red, and the first whose red proves nothing."""
    judge = _Judge()
    for is_seed, some in itertools.groupby(names, key=_is_seed):
        batch = list(some)
        if not is_seed and not judge.red:
            pytest.main([*PYTEST, *batch], [judge])
        for name in batch if is_seed else ():
            if not judge.red:
                judge.take(name, _failure_of(int(name.split()[1])))
    return [judge.red, judge.doubtful]


def _is_seed(name: str) -> bool:
    return name.startswith("seed ")


def _failure_of(seed: int) -> str:
    """What is silent or unclear in a program of one process."""
    return str(importlib.import_module("tests.host_programs").run(seed).failure)


def verdict(guard: Guard, copy: Path, seconds: float = 1200) -> str:
    """What turns red without the guard; GREEN if nothing does."""
    file = copy / guard.file
    whole = file.read_text() if file.exists() else ""
    without = guard.delete(whole)
    if without is None:
        return "GONE"
    names = _checks(guard, whole)
    try:
        file.write_text(without)
        red, doubtful = _Fork(_judge, names, copy=copy).result(seconds) or ("", "it hangs or dies")
    finally:
        file.write_text(whole)
    if red:
        return str(red)[:200]
    return f"DOUBTFUL: {doubtful[:200]}" if doubtful else f"GREEN in {', '.join(names) or 'none'}"


def _green(names: Sequence[str]) -> list[str]:
    """Those of the checks that are green with every guard."""
    seeds = [name for name in names if _is_seed(name) and not _failure_of(int(name.split()[1]))]
    judge, tests = _Judge(stops=False), [name for name in names if not _is_seed(name)]
    if tests:  # without any, pytest runs all
        pytest.main([*PYTEST, *tests], [judge])
    return [*seeds, *judge.green]


# --- processes ------------------------------------------------------------------------------------


class _Fork:
    """A call in a child, which has everything imported already. That takes longest.

    Args:
        work: What is called; its result goes through JSON.
        copy: Where the project's modules are imported from, anew.
        aloud: It prints.
    """

    def __init__(
        self, work: Callable[..., Any], *args: Any, copy: Path | None = None, aloud: bool = False
    ) -> None:
        handle, name = tempfile.mkstemp()
        os.close(handle)
        self._out, self.pid = Path(name), os.fork()
        if self.pid == 0:
            os.setpgrp()
            try:
                if copy is not None:
                    _enter(copy)
                if not aloud:
                    log = os.open(os.environ.get("GUARDS_LOG", os.devnull), LOG)
                    os.dup2(log, 1)
                    os.dup2(log, 2)
                self._out.write_text(json.dumps(work(*args)))
            finally:
                sys.stdout.flush()
                os._exit(0)

    def result(self, seconds: float) -> Any:
        """None: it took longer, or died."""
        deadline = time.monotonic() + seconds
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            time.sleep(0.1)
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
        text = self._out.read_text()
        self._out.unlink()
        return json.loads(text) if text else None


def _enter(copy: Path) -> None:
    """The project is the copy from now on, for this process and its ranks."""
    os.chdir(copy)
    os.environ["PYTHONPATH"] = sys.path[0] = str(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "dist_ema")]:
        del sys.modules[name]


def _copied(folder: str, name: str, some: Sequence[Guard]) -> Path:
    """The project, with everything compiled that the checks import. Compiling takes longest."""
    hidden = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "runs", "site")
    copy = Path(shutil.copytree(ROOT, Path(folder, name), ignore=hidden, symlinks=True))
    checks = {check.partition("::")[0] for guard in some for check in guard.checks}
    tests = sorted(check for check in checks if not _is_seed(check))
    _Fork(_compile, tests, copy=copy).result(1200)
    return copy


def _compile(tests: Sequence[str]) -> None:
    sys.dont_write_bytecode = False
    importlib.import_module("tests.host_programs")
    pytest.main([*PYTEST, "--collect-only", *tests])


def _work(some: list[Guard], copy: Path) -> list[str]:
    found = []
    for guard in some:
        begin = time.monotonic()
        answer = verdict(guard, copy)
        print(f"| {guard} | {answer} | {time.monotonic() - begin:.0f} s |", flush=True)
        found.append(answer)
    red = {each: each.partition(" - ")[0] for each in found if not each.startswith(BAD)}
    green = _Fork(_green, sorted({*red.values()}), copy=copy).result(3600) or ()
    for each in (each for each, check in red.items() if check not in green):
        print(f"DOUBTFUL, red with the guard too: {each}", flush=True)
        found[found.index(each)] = "DOUBTFUL"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="of the lines to check")
    parser.add_argument("--jobs", type=int, default=2, help="at once")
    options = parser.parse_args()
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    some = [each for each in guards() if all(word in str(each) for word in options.words)]
    with tempfile.TemporaryDirectory() as folder:
        forks = [
            _Fork(_work, share, _copied(folder, str(job), share), aloud=True)
            for job, share in enumerate(some[job :: options.jobs] for job in range(options.jobs))
            if share
        ]
        shares = [fork.result(86400) or ["DOUBTFUL: its process died"] for fork in forks]
    found = [answer for share in shares for answer in share]
    red = [answer for answer in found if not answer.startswith(BAD)]
    print(f"{len(red)} of {len(found)} guards are red when they are missing")
    return int(len(red) < len(some))


if __name__ == "__main__":
    sys.exit(main())
