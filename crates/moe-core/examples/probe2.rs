//! scratch
use burn::tensor::Device;
use moe_core::{host, kernels::weight::Weight};
fn cpu() -> f64 {
    let s = std::fs::read_to_string("/proc/self/stat").unwrap();
    let f: Vec<&str> = s.split_whitespace().collect();
    (f[13].parse::<f64>().unwrap() + f[14].parse::<f64>().unwrap()) / 100.0
}
fn main() {
    let d = Device::flex();
    for (m, k, n) in [
        (512, 512, 512),
        (1024, 512, 2816),
        (512, 512, 704),
        (512, 352, 512),
        (128, 512, 704),
        (273, 2048, 2816),
        (273, 1408, 2048),
        (512, 2048, 8192),
    ] {
        let bytes = vec![0x3fu8; 2 * k * n];
        let w = Weight::from_bf16(n, k, &d, Box::new(move |f| f(&bytes.chunks(2 * k).collect::<Vec<_>>())));
        let dense = Weight::dense(w.to_tensor());
        let x = host::from_vec((0..m * k).map(|i| i as f32 * 0.001).collect(), [m, k], &d);
        for (name, w) in [("amx", &w), ("gemm", &dense)] {
            let _ = w.forward(&x, None);
            let t = std::time::Instant::now();
            let c0 = cpu();
            let mut it = 0;
            let mut best = 9f64;
            while t.elapsed().as_secs_f64() < 1.0 {
                let t1 = std::time::Instant::now();
                let _ = w.forward(&x, None);
                best = best.min(t1.elapsed().as_secs_f64());
                it += 1;
            }
            let f = 2.0 * (m * k * n) as f64 / 1e9;
            println!(
                "{m}x{k}x{n} {name}: best {:.0} GFLOP/s, per cpu-second {:.0}",
                f / best,
                f * it as f64 / (cpu() - c0)
            );
        }
    }
}
