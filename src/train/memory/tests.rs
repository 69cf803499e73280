use serde_json::json;

use super::*;
use crate::model::families;
use crate::recipe::{AdapterRecipe, Auto, MicroBatch, Offload, Recompute, TileFeedForward, Tiling};

const OFF: TileFeedForward = TileFeedForward::Left(Tiling::Off);

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
    let thrift = Thrift::recomputing(recomputed_layers);
    Step { largest: MicroBatchSize { tokens, trained: tokens, documents: 1 }, accumulates: false, thrift }
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
    // An 8B model in under 8 GB: with all blocks recomputed, what a step of a document of 2048 tokens takes of it all.
    let peak = with(true, Some(&scheme), |run| run.plan(step(2048, 32)).peak);
    assert!(peak < 8_000_000_000, "{peak}");
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
                tile: OFF,
                offload: Offload::Off,
                host: None,
                largest: &|rows, _| MicroBatchSize {
                    tokens: u64::from(rows) * 2048,
                    trained: u64::from(rows) * 2048,
                    documents: rows.into(),
                },
                budget: Some(budget << 30),
                overhead: 200.0,
            };
            let choice = choose(run, &wish);
            assert_eq!(choice.fits, choice.memory.peak <= budget << 30);
            choice.thrift.recomputed_layers
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
            let largest = |rows: u32, _| MicroBatchSize {
                tokens: u64::from(rows) * 4096,
                trained: u64::from(rows) * 4096,
                documents: rows.into(),
            };
            let wish = Wish {
                sizes: &sizes,
                recompute,
                tile: OFF,
                offload: Offload::Off,
                host: None,
                largest: &largest,
                budget: Some(budget << 30),
                overhead: 200.0,
            };
            let Choice { micro_batch_size, gradient_accumulation_steps, thrift, fits, .. } = choose(run, &wish);
            assert_eq!(micro_batch_size * gradient_accumulation_steps, 12);
            (micro_batch_size, thrift.recomputed_layers, fits)
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
        let largest = |rows: u32, _| MicroBatchSize {
            tokens: u64::from(rows) * 4096,
            trained: u64::from(rows) * 4096,
            documents: rows.into(),
        };
        let sizes = [(4, 2)];
        let wish = Wish {
            sizes: &sizes,
            recompute: Recompute::None,
            tile: OFF,
            offload: Offload::Off,
            host: None,
            largest: &largest,
            budget: None,
            overhead: 200.0,
        };
        let choice = choose(run, &wish);
        let advice = advice(run, &choice, &largest);
        assert!(advice.contains("training.recompute: full would take"), "{advice}");
        assert!(advice.contains("training.micro_batch_size: 2 with gradient_accumulation_steps: 4"), "{advice}");
        let error = refuse_what_does_not_fit(&choice.memory, choice.memory.peak - 1, None, &advice).unwrap_err();
        assert_eq!(error.exit_code(), 8);
        assert!(error.to_string().contains("--ignore-memory-plan"), "{error}");
        refuse_what_does_not_fit(&choice.memory, choice.memory.peak, Some(0), &advice).unwrap();
        let offloaded = MemoryPlan { host: 2, ..choice.memory };
        refuse_what_does_not_fit(&offloaded, u64::MAX, Some(2), &advice).unwrap();
        let error = refuse_what_does_not_fit(&offloaded, u64::MAX, Some(1), &advice).unwrap_err();
        assert!(error.to_string().starts_with("host memory: "), "{error}");
    });
}

#[test]
fn tiles_are_for_what_does_not_fit_otherwise_and_as_large_as_fits() {
    with(true, None, |run| {
        let tokens = 131_072;
        let largest = |rows: u32, _| {
            let tokens = u64::from(rows) * tokens;
            MicroBatchSize { tokens, trained: tokens, documents: 1 }
        };
        let auto = TileFeedForward::Left(Tiling::Auto);
        let chosen = |sizes: &[(u32, u32)], budget: u64, recompute, tile| {
            let wish = Wish {
                sizes,
                recompute,
                tile,
                offload: Offload::Off,
                host: None,
                largest: &largest,
                budget: Some(budget),
                overhead: 200.0,
            };
            let choice = choose(run, &wish);
            (choice.micro_batch_size, choice.thrift, choice.fits)
        };
        let one = &[(1, 1)];
        let peak = |thrift| run.plan(Step { largest: largest(1, 1), accumulates: false, thrift }).peak;
        let whole = Thrift::recomputing(32);
        let tiled = |tile| Thrift { feed_forward_tile: Some(tile), ..whole };
        let peaks: Vec<u64> = [65_536, 8192, 1024].map(|tile| peak(tiled(tile))).into();
        assert!(peaks[0] < peak(whole) && peaks[1] < peaks[0] && peaks[2] <= peaks[1], "{peaks:?}");
        // Gate, up and what they are made of, of all tokens but a tile's.
        assert!(peak(whole) - peaks[2] > (tokens - 1024) * 14_336 * 2 * 4, "{peaks:?} {}", peak(whole));

        assert_eq!(chosen(one, peak(whole), Recompute::Auto, auto).1.feed_forward_tile, None);
        assert_eq!(chosen(one, peak(whole), Recompute::Full, auto).1, whole);
        assert_eq!(chosen(one, peak(whole) - 1, Recompute::Full, auto), (1, tiled(65_536), true));
        assert_eq!(chosen(one, peaks[0], Recompute::Auto, auto), (1, tiled(65_536), true));
        assert_eq!(chosen(one, peaks[0] - 1, Recompute::Full, auto), (1, tiled(32_768), true));
        let (_, least, fits) = chosen(one, 1, Recompute::Auto, auto);
        assert_eq!((peak(least), fits), (peaks[2], false), "the least there is");
        assert_eq!(chosen(one, peaks[1], Recompute::Auto, OFF), (1, whole, false));
        assert_eq!(chosen(one, u64::MAX, Recompute::Auto, TileFeedForward::Tokens(512)).1, tiled(512));
        let none = chosen(one, peaks[1], Recompute::None, auto);
        assert_eq!((none.1, none.2), (Thrift::default(), false), "what is kept is kept whole");
        // Fewer rows that fit as they are come before more in tiles.
        let two = run.plan(Step { largest: largest(2, 1), accumulates: false, thrift: tiled(1024) }).peak;
        assert!(two > peak(whole) * 21 / 20, "one row and its gradients fit, too");
        let (rows, thrift, fits) = chosen(&[(1, 2), (2, 1)], two, Recompute::Full, auto);
        assert_eq!((rows, thrift, fits), (1, whole, true));

        let wish = Wish {
            sizes: one,
            recompute: Recompute::Full,
            tile: OFF,
            offload: Offload::Off,
            host: None,
            largest: &largest,
            budget: None,
            overhead: 200.0,
        };
        let advice = advice(run, &choose(run, &wish), &largest);
        assert!(advice.contains("training.tile_feed_forward: 1024 with every layer recomputed"), "{advice}");
    });
}

#[test]
fn offloading_is_for_what_recomputing_alone_does_not_fit_and_takes_the_hosts_memory() {
    with(true, None, |run| {
        let largest =
            |rows: u32, _| MicroBatchSize { tokens: u64::from(rows) * 32_768, trained: 32, documents: rows.into() };
        let peak = |thrift| run.plan(Step { largest: largest(1, 1), accumulates: false, thrift });
        let whole = Thrift::recomputing(32);
        let away = Thrift { offload: true, ..whole };
        let stream = 32_768 * 4096 * 2;
        // All inputs but the two that are copied.
        assert_eq!(peak(whole).activations - peak(away).activations, 30 * stream);
        assert_eq!((peak(whole).host, peak(away).host), (0, 32 * stream));
        assert!(peak(whole).peak - peak(away).peak > 25 * stream, "{:?} {:?}", peak(whole), peak(away));
        let of_half = peak(Thrift { recomputed_layers: 16, ..away });
        assert_eq!(of_half.host, 16 * stream);

        let chosen = |budget, host, recompute, tile, offload| {
            let sizes = &[(1, 1)];
            let wish = Wish {
                sizes,
                recompute,
                tile,
                offload,
                host,
                largest: &largest,
                budget: Some(budget),
                overhead: 200.0,
            };
            let Choice { thrift, fits, .. } = choose(run, &wish);
            (thrift, fits)
        };
        let auto = TileFeedForward::Left(Tiling::Auto);
        let (recomputed, offloaded) = (peak(whole).peak, peak(away).peak);
        assert_eq!(chosen(recomputed, None, Recompute::Full, auto, Offload::Auto), (whole, true));
        assert_eq!(chosen(offloaded, None, Recompute::Full, auto, Offload::Auto), (away, true), "before tiles");
        let (thrift, fits) = chosen(offloaded, None, Recompute::Auto, auto, Offload::Auto);
        assert!(thrift.offload && thrift.feed_forward_tile.is_none() && fits, "{thrift:?}");
        let (thrift, fits) = chosen(offloaded, Some(30 * stream), Recompute::Auto, auto, Offload::Auto);
        assert!(!thrift.offload && !fits, "the host has no room: {thrift:?}");
        // A host with room for a few layers more than are needed, and for no more.
        let few = Thrift { recomputed_layers: 9, ..away };
        let (budget, host) = (peak(few).peak, 10 * stream);
        let found = chosen(budget, Some(host), Recompute::Auto, auto, Offload::On);
        assert_eq!(found, (few, true), "the fewest that fit send least to the host");
        let (thrift, fits) = chosen(offloaded - 1, None, Recompute::Full, auto, Offload::Auto);
        assert!(thrift.feed_forward_tile.is_some() && fits, "{thrift:?}");
        assert_eq!(chosen(u64::MAX, None, Recompute::Full, OFF, Offload::On), (away, true));
        assert_eq!(chosen(u64::MAX, None, Recompute::Auto, OFF, Offload::On).0.recomputed_layers, 0);
        assert_eq!(chosen(offloaded, None, Recompute::Full, OFF, Offload::Off), (whole, false));
        assert_eq!(chosen(1, None, Recompute::None, auto, Offload::Auto), (Thrift::default(), false));
    });
}
