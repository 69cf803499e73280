use serde_json::json;

use super::*;
use crate::model::families;
use crate::recipe::{AdapterRecipe, Auto, MicroBatch, Recompute};

fn eight_billion() -> ModelSpec {
    let config = json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": false,
    });
    families::from_config(&config).unwrap()
}

/// What `with` makes of the plan of an 8B model on a GPU, adapters on all linears or none.
fn with<T>(adapted: bool, scheme: Option<&Scheme>, with: impl FnOnce(&RunMemory<'_>) -> T) -> T {
    let spec = eight_billion();
    let adapters =
        if adapted { PlannedAdapters::of(&spec, &AdapterRecipe::default()).unwrap() } else { Default::default() };
    let training = TrainingRecipe::default();
    with(&RunMemory::new(Planned {
        spec: &spec,
        checkpoint: None,
        kind: Kind::BFloat16,
        device: Device::Cuda(0),
        scheme,
        adapters: &adapters,
        training: &training,
    }))
}

fn step(tokens: u64, recomputed_layers: usize) -> Step {
    Step { largest: MicroBatchSize { tokens, trained: tokens }, accumulates: false, recomputed_layers }
}

#[test]
fn an_8b_model_keeps_three_megabytes_per_token_as_the_formula_says() {
    let per_token = with(false, None, |run| run.plan(step(16_384, 0)).activations / 16_384);
    assert!((3_000_000..3_050_000).contains(&per_token), "{per_token}");
}

#[test]
fn a_block_that_is_gone_through_twice_keeps_twice_as_much() {
    let spec = eight_billion();
    let twice = ModelSpec { passes: 2, ..spec.clone() };
    let plan = |spec: &ModelSpec, recomputed_layers| {
        let (adapters, training) = (PlannedAdapters::default(), TrainingRecipe::default());
        let (kind, device) = (Kind::BFloat16, Device::Cuda(0));
        let planned =
            Planned { spec, checkpoint: None, kind, device, scheme: None, adapters: &adapters, training: &training };
        RunMemory::new(planned).plan(step(16_384, recomputed_layers)).activations as f64
    };
    for recomputed_layers in [0, 32] {
        let more = plan(&twice, recomputed_layers) / plan(&spec, recomputed_layers);
        assert!((1.95..2.01).contains(&more), "{more}");
    }
}

#[test]
fn a_quantised_base_takes_its_codes_and_scales() {
    let form = crate::quant::Form::FourBit { code: crate::quant::FourBitType::Nf4, block: 64, double_quant: true };
    let scheme = Scheme {
        form,
        kind: Kind::BFloat16,
        skip: vec!["lm_head".into()],
        products: Products::Dequantised,
        after_start: false,
    };
    let (dense, quantised) = (
        with(true, None, |run| run.plan(step(1, 0)).weights),
        with(true, Some(&scheme), |run| run.plan(step(1, 0)).weights),
    );
    let (blocks, ends) = (6_979_321_856u64, 2 * 128_256 * 4096u64);
    assert!((dense as f64 / (2 * (blocks + ends)) as f64 - 1.0).abs() < 1e-3, "{dense}");
    // Half a byte, a byte for every 64 and four for every 16384 of the blocks; the embedding and the head as they are.
    let expected = blocks as f64 * (0.5 + 1.0 / 64.0 + 4.0 / 16384.0) + 2.0 * ends as f64;
    assert!((quantised as f64 / expected - 1.0).abs() < 1e-3, "{quantised} {expected}");
    let whole = Scheme { products: Products::Cached, ..scheme };
    assert_eq!(with(true, Some(&whole), |run| run.plan(step(1, 0)).weights), dense);
}

#[test]
fn what_is_recomputed_is_not_kept_and_more_never_takes_more() {
    with(true, None, |run| {
        let peaks: Vec<u64> = (0..=32).map(|layers| run.plan(step(16_384, layers)).peak).collect();
        // The last block runs backward first: what it would not keep is there again at once.
        assert!(peaks[..32].windows(2).all(|pair| pair[1] <= pair[0]), "{peaks:?}");
        assert!(peaks[32] < peaks[31] + peaks[0] / 100, "{peaks:?}");
        assert!(peaks[32] < peaks[0] / 2, "{peaks:?}");
    });
}

#[test]
fn blocks_are_recomputed_only_as_far_as_memory_asks() {
    with(true, None, |run| {
        let layers = |budget: u64| {
            let wish = Wish {
                sizes: &[(8, 1)],
                recompute: Recompute::Auto,
                largest: &|rows, _| MicroBatchSize { tokens: u64::from(rows) * 2048, trained: u64::from(rows) * 2048 },
                budget: Some(budget << 30),
                overhead: 200.0,
            };
            let choice = choose(run, &wish);
            assert_eq!(choice.fits, choice.memory.peak <= budget << 30);
            choice.recomputed_layers
        };
        assert_eq!(layers(139), 0);
        let some = layers(50);
        assert!((1..32).contains(&some), "{some}");
        assert!(layers(35) > some);
        assert_eq!(layers(10), 32);
    });
}

#[test]
fn a_micro_batch_is_as_large_as_pays_and_fits() {
    with(true, None, |run| {
        let training = TrainingRecipe {
            micro_batch_size: MicroBatch::Planned(Auto::Auto),
            global_batch_size: Some(12),
            ..TrainingRecipe::default()
        };
        let sizes = sizes(&training);
        assert_eq!(sizes, [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]);
        let chosen = |budget: u64, recompute| {
            let largest =
                |rows: u32, _| MicroBatchSize { tokens: u64::from(rows) * 4096, trained: u64::from(rows) * 4096 };
            let wish =
                Wish { sizes: &sizes, recompute, largest: &largest, budget: Some(budget << 30), overhead: 200.0 };
            let Choice { micro_batch_size, gradient_accumulation_steps, recomputed_layers, fits, .. } =
                choose(run, &wish);
            assert_eq!(micro_batch_size * gradient_accumulation_steps, 12);
            (micro_batch_size, recomputed_layers, fits)
        };
        assert_eq!(chosen(1000, Recompute::Auto), (12, 0, true));
        // Keeping activations pays more than fewer micro-batches do.
        let (rows, recomputed, fits) = chosen(60, Recompute::Auto);
        assert!(rows < 12 && recomputed == 0 && fits, "{rows} {recomputed}");
        let (rows, recomputed, fits) = chosen(60, Recompute::Full);
        assert!(rows > 2 && recomputed == 32 && fits, "{rows}");
        let (rows, recomputed, fits) = chosen(8, Recompute::Auto);
        assert_eq!((rows, recomputed, fits), (1, 32, false), "the least there is");
    });
}

#[test]
fn a_run_that_does_not_fit_is_refused_with_what_would_take_less() {
    with(true, None, |run| {
        let largest = |rows: u32, _| MicroBatchSize { tokens: u64::from(rows) * 4096, trained: u64::from(rows) * 4096 };
        let sizes = [(4, 2)];
        let wish = Wish { sizes: &sizes, recompute: Recompute::None, largest: &largest, budget: None, overhead: 200.0 };
        let choice = choose(run, &wish);
        let advice = advice(run, &choice, &largest);
        assert!(advice.contains("training.recompute: full would take"), "{advice}");
        assert!(advice.contains("training.micro_batch_size: 2 with gradient_accumulation_steps: 4"), "{advice}");
        let error = refuse_what_does_not_fit(&choice.memory, choice.memory.peak - 1, &advice).unwrap_err();
        assert_eq!(error.exit_code(), 8);
        assert!(error.to_string().contains("--ignore-memory-plan"), "{error}");
        refuse_what_does_not_fit(&choice.memory, choice.memory.peak, &advice).unwrap();
    });
}
