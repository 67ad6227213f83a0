//! What a layer of experts costs beside a dense network of the same active size: time and peak memory of one forward
//! and backward pass.
//!
//! `cargo run --release -p moe-nn --example dispatch_cost [TOKENS [HIDDEN [ACTIVE]]]`

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use moe_nn::{FeedForwardConfig, MoeConfig};

/// Counts the bytes that are allocated now, and the most that were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    PEAK.fetch_max(NOW.fetch_add(bytes, Ordering::Relaxed) + bytes, Ordering::Relaxed);
}

// SAFETY: all calls go to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grown(size);
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The best time of some passes in milliseconds, and the peak memory of one beyond what there was before, in MiB.
fn measure(mut pass: impl FnMut()) -> (f64, f64) {
    pass();
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    pass();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    let time = (0..5).map(|_| {
        let start = Instant::now();
        pass();
        start.elapsed().as_secs_f64() * 1e3
    });
    (time.fold(f64::INFINITY, f64::min), peak as f64 / (1 << 20) as f64)
}

fn main() {
    let mut sizes = std::env::args().skip(1).map(|size| match size.parse::<usize>() {
        Ok(size) => size,
        Err(error) => panic!("sizes are whole numbers, found {size:?}: {error}"),
    });
    let (tokens, hidden, active) =
        (sizes.next().unwrap_or(2048), sizes.next().unwrap_or(256), sizes.next().unwrap_or(1024));
    let device = Device::default().autodiff();
    let x = || Tensor::<2>::random([tokens, hidden], Distribution::Normal(0.0, 1.0), &device).require_grad();
    println!("{tokens} tokens of {hidden}, {active} active intermediate dimensions, f32, forward and backward");
    println!("{:<22} {:>12} {:>14} {:>10} {:>9}", "layer", "parameters", "gradients MiB", "peak MiB", "time ms");
    let row = |name: &str, parameters: usize, (time, peak): (f64, f64)| {
        let gradients = (parameters * 4) as f64 / (1 << 20) as f64;
        println!("{name:<22} {parameters:>12} {gradients:>14.1} {peak:>10.1} {time:>9.1}");
    };
    let dense = FeedForwardConfig::new(hidden, active).init(&device);
    let cost = measure(|| {
        let _ = dense.forward(x()).sum().backward();
    });
    row("dense", dense.num_params(), cost);
    for (experts, top_k) in [(8, 2), (32, 4), (128, 8)] {
        let layer = MoeConfig::new(hidden, active / top_k, experts).with_top_k(top_k).init(&device);
        let cost = measure(|| {
            let _ = layer.forward(x()).hidden.sum().backward();
        });
        row(&format!("{experts} experts, top {top_k}"), layer.num_params(), cost);
    }
}
