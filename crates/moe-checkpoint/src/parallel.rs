//! Parallel work whose errors do not depend on which thread is first.

use rayon::prelude::*;

/// All values in order, or the error of the first item in order that has one.
///
/// Rayon's own `collect::<Result<Vec<_>, _>>()` gives the error that was met first in time, so two runs over the same
/// broken input may name two places. This one computes every item, and then reports as a plain loop would.
///
/// # Errors
/// The error of the failing item that comes first in the order of `results`.
///
/// ```
/// use rayon::prelude::*;
///
/// let halves = (0..4_u32).into_par_iter().map(|n| if n % 2 == 0 { Ok(n / 2) } else { Err(n) });
/// assert_eq!(moe_checkpoint::collect_in_order(halves), Err(1));
/// ```
pub fn collect_in_order<T: Send, E: Send>(
    results: impl ParallelIterator<Item = std::result::Result<T, E>>,
) -> std::result::Result<Vec<T>, E> {
    results.collect::<Vec<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_in_order_wins_whichever_thread_is_first() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        let fails = |n: usize| -> std::result::Result<usize, usize> {
            // The later an item, the sooner it fails.
            std::thread::sleep(std::time::Duration::from_micros(20 * (16 - n as u64)));
            if n >= 3 { Err(n) } else { Ok(n) }
        };
        for _ in 0..50 {
            let found = pool.install(|| collect_in_order((0..16).into_par_iter().map(fails)));
            assert_eq!(found, Err(3));
            let odd = (0..16).into_par_iter().filter(|n| n % 2 == 1);
            assert_eq!(pool.install(|| collect_in_order(odd.map(fails))), Err(3), "also where items are left out");
        }
        assert_eq!(collect_in_order((0..3).into_par_iter().map(fails)), Ok(vec![0, 1, 2]));
    }
}
