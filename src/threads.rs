//! How many threads the library may use.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

/// 0: as many as there are.
static WANTED: AtomicUsize = AtomicUsize::new(0);

/// Threads that attention, and V_a of an adapter, are computed with: as many as [`set`] says, at most
/// as many as there are in rayon's pool, which all calls share.
pub fn count() -> usize {
    let there = rayon::current_num_threads();
    match WANTED.load(Ordering::Relaxed) {
        0 => there,
        wanted => wanted.min(there),
    }
}

/// From now on, at most so many threads for each call; 0 for all cores. With 1 a call computes in the
/// thread that makes it and starts no other, as a host wants that has threads of its own.
pub fn set(count: usize) {
    WANTED.store(count, Ordering::Relaxed);
}

/// Calls that compute at this moment.
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// A call's share of the threads, while it computes in the thread that makes it and in some of the
/// pool's: of a host's own threads that call at the same time, each has fewer.
pub(crate) struct Share(usize);

impl Share {
    pub fn take() -> Self {
        let calls = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
        Self((count() / calls).max(1))
    }

    /// One at least: the caller's.
    pub fn threads(&self) -> usize {
        self.0
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        CALLS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All items, in their order, on at most [`count`] threads.
pub(crate) fn try_map<T: Sync, R: Send, E: Send>(
    items: &[T],
    map: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let threads = count().min(items.len());
    if threads <= 1 {
        return items.iter().map(map).collect();
    }
    let next = AtomicUsize::new(0);
    let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < items.len());
    let work = |_| {
        let mut done = Vec::new();
        while let Some(i) = take() {
            done.push((i, map(&items[i])?));
        }
        Ok(done)
    };
    let parts = (0..threads).into_par_iter().with_max_len(1).map(work);
    let parts = parts.collect::<Result<Vec<_>, E>>()?;
    let mut all: Vec<_> = parts.into_iter().flatten().collect();
    all.sort_unstable_by_key(|(i, _)| *i);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}
