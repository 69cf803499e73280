//! A cell of any type as JSON.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{self, DataType, Field};
use arrow::util::display::array_value_to_string;
use serde_json::{Map, Value};

use super::{ROW_LIMIT, too_long};

pub(super) fn string(array: &ArrayRef, row: usize) -> Result<String, String> {
    let bytes = match array.data_type() {
        DataType::Utf8View => array.as_string_view().value(row).as_bytes(),
        DataType::BinaryView => array.as_binary_view().value(row),
        other => return Err(format!("{other}, expected a string")),
    };
    if bytes.len() > ROW_LIMIT {
        return Err(too_long("cell", bytes.len()));
    }
    std::str::from_utf8(bytes)
        .map(str::to_string)
        .map_err(|error| format!("the text is not valid UTF-8 ({error}): decode it to UTF-8 when writing the file"))
}

/// Any cell as JSON. The null fields of structs are left out: arrow gives every struct the fields of all.
pub(super) fn json(array: &ArrayRef, row: usize) -> Result<Value, String> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => array.as_primitive::<datatypes::Int8Type>().value(row).into(),
        DataType::Int16 => array.as_primitive::<datatypes::Int16Type>().value(row).into(),
        DataType::Int32 => array.as_primitive::<datatypes::Int32Type>().value(row).into(),
        DataType::Int64 => array.as_primitive::<datatypes::Int64Type>().value(row).into(),
        DataType::UInt8 => array.as_primitive::<datatypes::UInt8Type>().value(row).into(),
        DataType::UInt16 => array.as_primitive::<datatypes::UInt16Type>().value(row).into(),
        DataType::UInt32 => array.as_primitive::<datatypes::UInt32Type>().value(row).into(),
        DataType::UInt64 => array.as_primitive::<datatypes::UInt64Type>().value(row).into(),
        DataType::Float32 => f64::from(array.as_primitive::<datatypes::Float32Type>().value(row)).into(),
        DataType::Float64 => array.as_primitive::<datatypes::Float64Type>().value(row).into(),
        DataType::Utf8View | DataType::BinaryView => Value::String(string(array, row)?),
        DataType::List(_) => {
            let items = array.as_list::<i32>().value(row);
            Value::Array((0..items.len()).map(|index| json(&items, index)).collect::<Result<_, _>>()?)
        }
        DataType::Struct(fields) => object(fields.iter().map(AsRef::as_ref), array.as_struct().columns(), row)?,
        DataType::Map(..) => {
            let entries = array.as_map().value(row);
            let mut object = Map::new();
            for index in 0..entries.len() {
                let value = json(entries.column(1), index)?;
                if !value.is_null() {
                    object.insert(string(entries.column(0), index)?, value);
                }
            }
            Value::Object(object)
        }
        // Dates, times, decimals: as text.
        _ => Value::String(array_value_to_string(array, row).map_err(|error| error.to_string())?),
    })
}

fn object<'a>(fields: impl Iterator<Item = &'a Field>, columns: &[ArrayRef], row: usize) -> Result<Value, String> {
    let mut object = Map::new();
    for (field, column) in fields.zip(columns) {
        let value = json(column, row)?;
        if !value.is_null() {
            object.insert(field.name().clone(), value);
        }
    }
    Ok(Value::Object(object))
}
