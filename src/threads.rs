//! How many threads the library may use, and work that they do together.

use std::{
    num::NonZero,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// 0: as many as there are.
static WANTED: AtomicUsize = AtomicUsize::new(0);

/// What all calls share beside the threads that make them; none where there is one core.
static POOL: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
    let builder = ThreadPoolBuilder::new()
        .num_threads(there() - 1)
        .thread_name(|i| format!("vmix-{i}"))
        .start_handler(|_| late::know_this_thread());
    // A host that may start no threads has its own.
    (there() > 1).then(|| builder.build().ok()).flatten()
});

/// As many as there are cores, or as the variable of rayon says.
fn there() -> usize {
    static THERE: LazyLock<usize> = LazyLock::new(|| {
        let said = std::env::var("RAYON_NUM_THREADS").ok();
        match said.and_then(|count| count.parse().ok()) {
            Some(count) if count > 0 => count,
            _ => thread::available_parallelism().map_or(1, NonZero::get),
        }
    });
    *THERE
}

/// Threads that attention, and V_a of an adapter, are computed with: as many as [`set`] says, at most
/// as many as there are cores, or as the environment variable `RAYON_NUM_THREADS` says. One of them
/// makes the call; the others are in a pool that all calls share.
pub fn count() -> usize {
    match WANTED.load(Ordering::Relaxed) {
        0 => there(),
        wanted => wanted.min(there()),
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

/// Does a step after the other until none is left, which a step says, on a thread for each state: on
/// this one, and on some of the pool.
pub(crate) fn work<S: Send>(states: &mut [S], step: impl Fn(&mut S) -> bool + Sync) {
    let Some((own, others)) = states.split_first_mut() else {
        return;
    };
    let pool = POOL.as_ref().filter(|_| !others.is_empty());
    let Some(pool) = pool else {
        while step(own) {}
        return;
    };
    let wanted = others.len();
    let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    pool.in_place_scope(|scope| {
        let (step, begun, ended) = (&step, &begun, &ended);
        for state in others {
            scope.spawn(move |_| {
                begun.fetch_add(1, Ordering::Relaxed);
                while step(state) {}
                ended.fetch_add(1, Ordering::Relaxed);
            });
        }
        let mut sent = 0;
        while step(own) {
            if sent < MOST_SENT && begun.load(Ordering::Relaxed) < wanted {
                late::send_away();
                sent += 1;
            }
        }
        // The others are about to end: to fall asleep and be woken would take longer.
        let patience = Instant::now() + PATIENCE;
        while ended.load(Ordering::Relaxed) < wanted && Instant::now() < patience {
            std::hint::spin_loop();
        }
        (0..END).for_each(|_| std::hint::spin_loop());
    });
}

/// How long a thread waits awake for others, and how often it spins until one has really ended that
/// says so.
const PATIENCE: Duration = Duration::from_micros(200);
const END: usize = 16;

/// How often a call looks after late threads.
const MOST_SENT: usize = 8;

/// All items, in their order, on at most [`count`] threads.
pub(crate) fn try_map<T: Sync, R: Send, E: Send>(
    items: &[T],
    map: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let next = AtomicUsize::new(0);
    let threads = count().min(items.len());
    let mut done: Vec<Vec<(usize, Result<R, E>)>> = (0..threads).map(|_| Vec::new()).collect();
    work(&mut done, |done| {
        let i = next.fetch_add(1, Ordering::Relaxed);
        let Some(item) = items.get(i) else {
            return false;
        };
        let result = map(item);
        if result.is_err() {
            next.store(items.len(), Ordering::Relaxed);
        }
        done.push((i, result));
        true
    });
    let mut all: Vec<_> = done.into_iter().flatten().collect();
    all.sort_unstable_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, result)| result).collect()
}

/// A thread that is woken waits for a core. Linux puts it on that of the thread that woke it if it
/// takes no other for idle, as in virtual machines, where one that sleeps counts as taken away by the
/// host; and there it waits until its waker, which computes, has done its work alone.
#[cfg(target_os = "linux")]
mod late {
    use std::{mem, sync::Mutex};

    use libc::{CPU_CLR, CPU_COUNT, cpu_set_t, pid_t, sched_getaffinity, sched_setaffinity};

    /// The pool's threads, which live as long as the process.
    static THREADS: Mutex<Vec<pid_t>> = Mutex::new(Vec::new());

    pub fn know_this_thread() {
        // SAFETY: it has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        THREADS
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .push(thread);
    }

    /// Sends all threads of the pool that wait for this thread's core to others that they may use.
    pub fn send_away() {
        // Another caller is at it, or a process was forked from it.
        let Ok(threads) = THREADS.try_lock() else {
            return;
        };
        // SAFETY: it has no arguments.
        let Ok(core) = usize::try_from(unsafe { libc::sched_getcpu() }) else {
            return;
        };
        let size = size_of::<cpu_set_t>();
        for thread in threads.iter() {
            // SAFETY: sets of cores are plain bits, of this size; a thread that does not exist is an
            // error. The lock keeps others from taking the smaller set for what the host has set.
            unsafe {
                let mut cores: cpu_set_t = mem::zeroed();
                if sched_getaffinity(*thread, size, &mut cores) != 0 || core >= 8 * size {
                    continue;
                }
                let mut others = cores;
                CPU_CLR(core, &mut others);
                if CPU_COUNT(&others) > 0 && sched_setaffinity(*thread, size, &others) == 0 {
                    sched_setaffinity(*thread, size, &cores);
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn cores() -> Vec<Vec<usize>> {
            let threads = THREADS.lock().unwrap();
            let cores_of = |thread: &pid_t| {
                // SAFETY: as above.
                let cores = unsafe {
                    let mut cores: cpu_set_t = mem::zeroed();
                    let size = size_of::<cpu_set_t>();
                    assert_eq!(sched_getaffinity(*thread, size, &mut cores), 0);
                    cores
                };
                let all = 0..8 * size_of::<cpu_set_t>();
                // SAFETY: as above; cores of the set.
                all.filter(|core| unsafe { libc::CPU_ISSET(*core, &cores) })
                    .collect()
            };
            threads.iter().map(cores_of).collect()
        }

        #[test]
        fn threads_that_were_sent_away_may_come_back() {
            super::super::work(&mut [0; 2], |_| false);
            // Threads that had nothing to do may still be starting.
            while cores().len() < super::super::there() - 1 {
                std::thread::yield_now();
            }
            let before = cores();
            for _ in 0..1000 {
                send_away();
            }
            assert_eq!(cores(), before);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod late {
    pub fn know_this_thread() {}
    pub fn send_away() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_done_once() {
        for threads in [1, 2, 5] {
            let next = AtomicUsize::new(0);
            let mut done = vec![Vec::new(); threads];
            work(&mut done, |done| {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i < 1000 {
                    done.push(i);
                }
                i < 1000
            });
            let mut all = done.concat();
            all.sort_unstable();
            assert_eq!(all, (0..1000).collect::<Vec<_>>());
        }
    }

    #[test]
    fn results_are_in_order_and_the_first_error_wins() {
        let items: Vec<usize> = (0..100).collect();
        let doubled = try_map(&items, |i| Ok::<_, ()>(2 * i)).unwrap();
        assert_eq!(doubled, (0..100).map(|i| 2 * i).collect::<Vec<_>>());
        let failed = try_map(&items, |i| if *i % 7 == 3 { Err(*i) } else { Ok(()) });
        assert_eq!(failed.unwrap_err(), 3);
    }
}
