use engraft::model::*;
use engraft::recipe::BaseSource;
use engraft::weights::Checkpoint;
use tch::{Device, Kind, Tensor};
fn main() {
    let s = std::time::Instant::now();
    let home = std::env::var("HOME").unwrap();
    let checkpoint = Checkpoint::open(&BaseSource::Gguf(format!("{home}/.cache/engraft/models/SmolLM2-135M-Instruct.Q4_1.gguf").into())).unwrap();
    println!("open {:?}", s.elapsed());
    let mut model = Decoder::load(&checkpoint, Kind::BFloat16, Device::Cpu, &|_, _| ()).unwrap();
    println!("load {:?}", s.elapsed());
    tch::manual_seed(1);
    let mut params = vec![];
    for l in model.linears_mut() {
        if l.name == "lm_head" { continue }
        let (o, i) = l.shape();
        let a = (Tensor::rand([16, i], (Kind::Float, Device::Cpu)) * 0.05).set_requires_grad(true);
        let b = Tensor::zeros([o, 16], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        params.push(a.shallow_clone());
        params.push(b.shallow_clone());
        l.adapter = Some(LowRank { a, b, scale: 2.0, dropout: 0.0 });
    }
    for (len, n) in [(256i64, 4i64), (128, 8), (90, 11)] {
        let t = len * n;
        let ids = Tensor::randint(49000, [t], (Kind::Int64, Device::Cpu));
        let documents = Documents { offsets: (0..=n).map(|i| i * len).collect() };
        let positions: Vec<i64> = documents.spans().flat_map(|(_, l)| 0..l).collect();
        let positions = Tensor::from_slice(&positions);
        for rho in [1.0, 0.4] {
            let s_rows = (t as f64 * rho) as i64;
            let rows = Tensor::arange(s_rows, (Kind::Int64, Device::Cpu));
            let targets = ids.narrow(0, 0, s_rows);
            let mut best = (1e9f64, 1e9f64);
            for _ in 0..6 {
                let s = std::time::Instant::now();
                let h = model.hidden(&ids, &positions, &documents, Forward { seed: Some(1), ..Forward::default() });
                let loss = model.cross_entropy(&h.index_select(0, &rows), &targets, Forward { seed: Some(1), ..Forward::default() }, 1e-3);
                let f = s.elapsed().as_secs_f64();
                loss.backward();
                let all = s.elapsed().as_secs_f64();
                best = (best.0.min(f), best.1.min(all));
                for p in &params { let mut g = p.grad(); let _ = g.zero_(); }
            }
            println!("{n}x{len} rho {rho}: forward {:.0} ms, all {:.0} ms, {:.0} tokens/s", best.0 * 1e3, best.1 * 1e3, t as f64 / best.1);
        }
    }
    let st = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("{}", st.lines().find(|l| l.starts_with("VmHWM")).unwrap());
}
