// Tables sort by a click, Enter or Space on a column's head: descending first, then ascending, then as they came.
// Rows stay among their kind (ours, published, chance); empty cells come last. Without scripts the tables just stand.
for (const table of document.querySelectorAll("table.sortable")) {
  const bodies = [...table.tBodies].map(body => ({ body, rows: [...body.rows] }));
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    return value === undefined ? cell.textContent.trim() : Number(value);
  };
  const compare = (left, right) =>
    typeof left === "number" && typeof right === "number"
      ? right - left
      : String(left).localeCompare(String(right), undefined, { numeric: true });
  const sort = column => {
    const order = { descending: "ascending", ascending: "none" }[heads[column].getAttribute("aria-sort")] || "descending";
    heads.forEach(head => head.removeAttribute("aria-sort"));
    if (order !== "none") heads[column].setAttribute("aria-sort", order);
    for (const { body, rows } of bodies) {
      const full = rows.filter(row => keyOf(row, column) !== "");
      const empty = rows.filter(row => keyOf(row, column) === "");
      full.sort((a, b) => compare(keyOf(a, column), keyOf(b, column)) * (order === "ascending" ? -1 : 1));
      body.append(...(order === "none" ? rows : [...full, ...empty]));
    }
  };
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(column));
    head.append(button);
  });
}
