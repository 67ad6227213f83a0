//! scratch
use burn::tensor::Device;
use moe_core::{data::*, kernels::reduce::*, trace::*, *};
struct F {
    acc: Vec<f64>,
}
impl Observer for F {
    fn needs(&self) -> Signals {
        Signals::GRADIENTS
    }
    fn expert(&mut self, t: &ExpertTrace<'_>) -> Result<()> {
        let b = t.backward.unwrap();
        let i = t.expert_weights.width();
        let xn = row_square_norms(t.input);
        let dn: Vec<f32> = row_square_norms(b.upstream).iter().zip(t.routing_weights).map(|(d, w)| d * w * w).collect();
        self.acc.resize(2 * i, 0.0);
        add_weighted_column_squares(b.gate_up, &xn, &mut self.acc);
        add_weighted_column_squares(t.units.unwrap(), &dn, &mut self.acc[..i]);
        Ok(())
    }
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let n: usize = a[2].parse().unwrap();
    let wt: usize = a[3].parse().unwrap();
    let mm: u64 = a[4].parse::<u64>().unwrap() << 20;
    let m = Model::open(&a[1], &Device::flex(), Some(mm)).unwrap();
    let rows: Vec<Sequence> = std::fs::read_to_string(format!("{}/tokens.jsonl", a[1]))
        .unwrap()
        .lines()
        .take(n)
        .map(|l| {
            let v: serde_json::Value = serde_json::from_str(l).unwrap();
            Sequence::new(v["input_ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect())
        })
        .collect();
    let w = waves(&rows, WaveOptions::Tokens(std::num::NonZeroUsize::new(wt).unwrap()));
    let e = Engine::new(&m, EngineOptions::default());
    println!("{:?}", e.plan(w[0].tokens(), Signals::GRADIENTS));
    let mut f = F { acc: vec![] };
    let t = std::time::Instant::now();
    let mut tok = 0;
    for w in &w {
        let t0 = std::time::Instant::now();
        let r = e.run(w, &mut f).unwrap();
        tok += r.tokens;
        println!(
            "wave {} {:.2}s loss {:.4} {:?}",
            w.id,
            t0.elapsed().as_secs_f64(),
            r.loss.unwrap() / r.loss_tokens as f64,
            moe_core::memory::process_memory().map(|p| (p.peak >> 20, p.anonymous >> 20, p.mapped >> 20))
        );
    }
    println!("{:.1} tok/s sum {}", tok as f64 / t.elapsed().as_secs_f64(), f.acc.iter().sum::<f64>());
}
