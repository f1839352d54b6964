//! How the work is cut and shared out.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::{Checked, engine::Engine};
use crate::{
    Result,
    buffer::Buffer,
    threads,
    view::{RawRows, TensorView},
};

/// What a kernel makes of a block of queries, all in f32.
pub(super) struct Block<'a> {
    /// Queries, at least one.
    pub count: usize,
    /// Their rows, of `dim` numbers, `query_stride` apart.
    pub query: *const f32,
    pub query_stride: isize,
    /// Of the head, as the kernel has packed them. Keys are scaled to scores in powers of two.
    pub keys: &'a [f32],
    pub values: &'a [f32],
    /// λ·V_a packed like the values, and what each query multiplies it with; where that is one
    /// number for all queries, it is in the values.
    pub regional: Option<(&'a [f32], &'a [f32])>,
    /// A row a query, as wide as the keys padded: what is added to the scores.
    pub mask: Option<&'a [f32]>,
    /// A row a query, as wide as the keys padded: scores, then powers of two.
    pub scores: &'a mut [f32],
    /// One divided by the sum of each row of powers.
    pub factors: &'a mut [f32],
    /// Where a result of V_a alone has place, if there are strengths for each query.
    pub extra: &'a mut [f32],
    /// The result, rows of `dim` numbers.
    pub out: *mut f32,
    pub out_stride: isize,
}

/// Numbers that a block of scores has at most, unless its rows are longer than that: 128 KB.
const SCORES: usize = 1 << 15;

/// Queries of a block, about: few enough for its scores to stay in the nearest cache.
const BLOCK: usize = 40;

/// Keys that are asked for before they are read.
const AHEAD: usize = 8;

/// Queries of a part of a head, at least, so that packing is little beside it.
const PART: usize = 256;

/// The heads, cut into parts of their queries, and which are taken.
struct Parts {
    heads: usize,
    queries: usize,
    /// Queries of a part.
    step: usize,
    /// For each thread the next of its own parts, and where they end.
    own: Vec<(AtomicUsize, usize)>,
}

impl Parts {
    fn new([batch, queries, heads, _]: [usize; 4], threads: usize, block: usize) -> Self {
        // Some for every thread, so that a late one is not waited for long.
        let wanted = (4 * threads).div_ceil(batch * heads);
        let ranges = match threads {
            1 => 1,
            _ => wanted.min(queries.div_ceil(PART)),
        };
        let step = queries.div_ceil(ranges).next_multiple_of(block);
        let count = batch * heads * queries.div_ceil(step);
        let threads = threads.min(count);
        let first = |thread| thread * count / threads;
        let own = |thread| (AtomicUsize::new(first(thread)), first(thread + 1));
        Self {
            heads,
            queries,
            step,
            own: (0..threads).map(own).collect(),
        }
    }

    /// No more than there are parts.
    fn threads(&self) -> usize {
        self.own.len()
    }

    /// Batch entry, head and queries of a part that nobody has taken: a thread's own first, which
    /// are the same in every call, so that its cache may still have them; then those of others.
    fn take(&self, thread: usize) -> Option<(usize, usize, Range<usize>)> {
        let part = (0..self.threads()).find_map(|later| {
            let (next, end) = &self.own[(thread + later) % self.threads()];
            let part = next.fetch_add(1, Ordering::Relaxed);
            (part < *end).then_some(part)
        })?;
        let ranges = self.queries.div_ceil(self.step);
        let (head, first) = (part / ranges, part % ranges * self.step);
        let queries = first..self.queries.min(first + self.step);
        Some((head / self.heads, head % self.heads, queries))
    }
}

/// The memory of a thread. It grows with the keys and the width of a head, not with the queries.
struct Scratch {
    thread: usize,
    keys: Buffer,
    values: Buffer,
    aes_values: Buffer,
    scores: Buffer,
    mask: Buffer,
    /// A row for each query of a block, where they are not read or written in place.
    query: Buffer,
    out: Buffer,
    extra: Buffer,
    /// One for each query of a block.
    factors: Buffer,
    strengths: Buffer,
    /// One key or value, or its part of V_a.
    row: Buffer,
    aes_row: Buffer,
    /// Batch entry and head of what is packed.
    packed: Option<(usize, usize)>,
}

/// Attention whose arguments were checked, with a kernel, on as many threads as the library may use.
///
/// # Errors
/// Without memory for the threads' scratch. Then nothing was written.
pub(super) fn forward(
    checked: &Checked<'_>,
    engine: &Engine,
    output: &RawRows<'_>,
    map: Option<(&RawRows<'_>, usize)>,
) -> Result<()> {
    let shape = checked.query.shape();
    let step = engine.block_step();
    let block = SCORES / engine.padded_keys() / step * step;
    let block = block.clamp(step, BLOCK.next_multiple_of(step));
    let block = block.min(shape[1].next_multiple_of(step));
    let share = threads::Share::take();
    let threads = share.threads();
    let parts = Parts::new(shape, threads, block);
    let work = Work {
        checked,
        engine,
        output,
        map,
    };
    let mut scratches = (0..parts.threads())
        .map(|thread| work.scratch(thread, block))
        .collect::<Result<Vec<_>>>()?;
    threads::work(&mut scratches, |scratch| {
        let Some((b, h, queries)) = parts.take(scratch.thread) else {
            return false;
        };
        work.pack(scratch, b, h);
        for first in queries.clone().step_by(block) {
            let count = block.min(queries.end - first);
            work.block(scratch, b, h, first..first + count);
        }
        true
    });
    Ok(())
}

/// What all threads do.
struct Work<'a> {
    checked: &'a Checked<'a>,
    engine: &'a Engine,
    output: &'a RawRows<'a>,
    map: Option<(&'a RawRows<'a>, usize)>,
}

impl Work<'_> {
    fn scratch(&self, thread: usize, block: usize) -> Result<Scratch> {
        let Self {
            checked, engine, ..
        } = self;
        let (keys, values) = engine.packed_len();
        let (scores, rows) = (
            block.saturating_mul(engine.padded_keys()),
            block.saturating_mul(checked.dim()),
        );
        let if_there = |there: bool, count| Buffer::zeros(if there { count } else { 0 });
        let regional = checked.is_regional();
        Ok(Scratch {
            thread,
            keys: Buffer::zeros(keys)?,
            values: Buffer::zeros(values)?,
            aes_values: if_there(regional, values)?,
            scores: Buffer::zeros(scores)?,
            mask: if_there(checked.mask.is_some(), scores)?,
            query: Buffer::zeros(rows)?,
            out: Buffer::zeros(rows)?,
            extra: if_there(regional, rows)?,
            factors: Buffer::zeros(block)?,
            strengths: Buffer::zeros(block)?,
            row: Buffer::zeros(checked.dim())?,
            aes_row: Buffer::zeros(checked.dim())?,
            packed: None,
        })
    }

    /// Packs the keys and values of a head: V_c + λ·V_a.
    fn pack(&self, scratch: &mut Scratch, b: usize, h: usize) {
        if scratch.packed.replace((b, h)) == Some((b, h)) {
            return;
        }
        let Self {
            checked, engine, ..
        } = self;
        let Scratch {
            keys,
            values,
            aes_values,
            row,
            aes_row,
            ..
        } = scratch;
        let scale = checked.scale * std::f32::consts::LOG2_E;
        let aes_value = checked.aes_value_of(b);
        // A head's rows lie apart, so that no processor guesses the next ones.
        let ask = |view: &TensorView<'_>, t| {
            let rows = view.rows([b % view.shape()[0], t, h, 0]);
            engine.prefetch(rows.map(|(row, _)| row));
        };
        for t in 0..checked.keys.min(AHEAD) {
            ask(&checked.key, t);
        }
        for t in 0..checked.keys {
            if t + AHEAD < checked.keys {
                ask(&checked.key, t + AHEAD);
            }
            ask(&checked.value, t);
            engine.pack_key(keys, t, (checked.key.row([b, t, h, 0], row), scale));
            if let Some((aes_value, _)) = aes_value
                && t < aes_value.shape()[1]
            {
                ask(&aes_value, t);
            }
        }
        for t in 0..checked.keys {
            let value = (checked.value.row([b, t, h, 0], row), 1.0);
            let added = aes_value.map(|(aes_value, strength)| {
                let index = [b, t % aes_value.shape()[1], h, 0];
                (aes_value.row(index, aes_row), strength)
            });
            match added {
                Some(added) if checked.is_regional() => {
                    engine.pack_value(values, t, value, None);
                    engine.pack_value(aes_values, t, added, None);
                }
                added => engine.pack_value(values, t, value, added),
            }
        }
    }

    /// A block of a head's queries.
    fn block(&self, scratch: &mut Scratch, b: usize, h: usize, queries: Range<usize>) {
        let Self {
            checked,
            engine,
            output,
            ..
        } = self;
        let (dim, padded, keys) = (checked.dim(), engine.padded_keys(), checked.keys);
        let index = [b, queries.start, h, 0];
        let in_place = checked.query.rows(index);
        if in_place.is_none() {
            for (row, i) in scratch.query.chunks_exact_mut(dim).zip(queries.clone()) {
                checked.query.read_row([b, i, h, 0], row);
            }
        }
        if let Some(mask) = checked.mask {
            for (row, i) in scratch.mask.chunks_exact_mut(padded).zip(queries.clone()) {
                mask.read_row([b, i, h, 0], &mut row[..keys]);
            }
        }
        let mut regional = false;
        if let (true, Some(mask)) = (checked.is_regional(), checked.query_mask) {
            for (strength, i) in scratch.strengths.iter_mut().zip(queries.clone()) {
                mask.read_row([b, i, 0, 0], std::slice::from_mut(strength));
                regional |= *strength != 0.0;
            }
            regional &= checked.aes_value_of(b).is_some();
        }
        let (query, query_stride) = in_place.unwrap_or((scratch.query.as_ptr(), dim as isize));
        let written = output.rows(index);
        let (out, out_stride) = written.unwrap_or((scratch.out.as_mut_ptr(), dim as isize));
        let mut block = Block {
            count: queries.len(),
            query,
            query_stride,
            keys: &scratch.keys,
            values: &scratch.values,
            regional: regional.then_some((&scratch.aes_values[..], &scratch.strengths[..])),
            mask: checked.mask.is_some().then_some(&scratch.mask[..]),
            scores: &mut scratch.scores,
            factors: &mut scratch.factors,
            extra: &mut scratch.extra,
            out,
            out_stride,
        };
        // SAFETY: the queries' rows are where they are said to be, and those of the result, which
        // nobody else has; the rest is as long as the engine asked for.
        unsafe { engine.block(&mut block) };
        if written.is_none() {
            for (row, i) in scratch.out.chunks_exact(dim).zip(queries.clone()) {
                // SAFETY: this part of the result is this thread's alone.
                unsafe { output.write_row([b, i, h, 0], row) };
            }
        }
        if let Some((map, first_head)) = self.map
            && let Some(h) = h.checked_sub(first_head)
            && h < map.shape()[2]
        {
            let rows = scratch
                .scores
                .chunks_exact_mut(padded)
                .zip(scratch.factors.iter());
            for ((row, factor), i) in rows.zip(queries) {
                row[..keys].iter_mut().for_each(|x| *x *= factor);
                // SAFETY: as above.
                unsafe { map.write_row([b, i, h, 0], &row[..keys]) };
            }
        }
    }
}
