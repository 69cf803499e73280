//! One page of data per family: `config.json` to [`crate::model::ModelSpec`] and tensor names.
